"""An export tried out before the first step: a run of days must not find out at its end that it cannot be written."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from treering.core.errors import CheckpointError, PlanError
from treering.plan.adapter import contents, exportable
from treering.plan.export import layout
from treering.plan.plan import Plan
from treering.plan.values import announced, groups, joined, live_values
from treering.store.model_folder import tensor_files
from treering.store.publish import on_first, refuse_full
from treering.store.tensor_writer import size
from treering.weights.plain_tensors import places, to_file_layout


def rehearse(plan: Plan, folder: Path) -> None:
    """Join and translate one block of the live model, compare with the source's files, and look for room at `folder`.

    Every rank calls it, once the weights are there. `folder` need not be new: only the place is looked at.
    """
    whole = layout(plan)
    on_first(lambda: refuse_full(folder, _least(plan, whole)), f"looking at {folder}")
    values = live_values(plan)
    for group in groups(plan, _one_block(plan)):
        tensors = {name: joined(plan, name, values).cpu() for name in group}
        on_first(lambda group=group, tensors=tensors: _check(plan, group, tensors), "rehearsing the export")  # type: ignore[misc]
    if plan.folder is not None and plan.source is not None and plan.source.held is None:
        source = plan.folder
        on_first(lambda: _compare(plan, whole, source), f"comparing the export with {source}")


def _one_block(plan: Plan) -> list[str]:
    block = plan.anatomy.blocks[0].fqn + "."
    return [name for name in plan.plain if name.startswith(block)]


def _least(plan: Plan, whole: Mapping[str, Tensor]) -> int:
    """Bytes of the smallest export that says it all: of the adapters, where each can stand alone, else the model's."""
    need = 0
    for applied in plan.applied:
        if applied.parts and applied.adapter is None:
            return sum(map(size, whole.values()))
        if applied.adapter is not None:
            try:
                chosen = exportable(plan, applied.adapter.name)
            except PlanError:
                return sum(map(size, whole.values()))
            need += sum(map(size, contents(plan, chosen).values()))
    return need or sum(map(size, whole.values()))


def _check(plan: Plan, group: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} would be exported with values that are not finite")
    wanted = {key: (tuple(t.shape), t.dtype) for key, t in announced(plan, group).items()}
    made = {key: (tuple(t.shape), t.dtype) for key, t in to_file_layout(plan.model, tensors).items()}
    if made != wanted:
        wrong = sorted(key for key in made.keys() | wanted.keys() if made.get(key) != wanted.get(key))[0]
        raise CheckpointError(f"{wrong} would be exported as {made.get(wrong)}; the folder needs {wanted.get(wrong)}")


def _compare(plan: Plan, whole: Mapping[str, Tensor], source: Path) -> None:
    """Names may be younger and dtypes others than the source's; but what is read must become the same tensors again."""
    files = tensor_files(source)
    for name in sorted(set(whole) & set(files)):
        with safe_open(files[name], "pt") as opened:
            found = tuple(opened.get_slice(name).get_shape())
        if found != tuple(whole[name].shape):
            raise CheckpointError(
                f"{name} would be exported with shape {tuple(whole[name].shape)}; {source} has {found}"
            )
    names = dict(plan.plain)
    before, _ = places(plan.model, files, names)
    after, _ = places(plan.model, whole, names)
    unused = set(plan.source.unused) if plan.source is not None else set()
    for target, items in before.items():
        keys = [key for key, _ in items if key not in unused]
        if _has(plan, target, items) and keys and len(after.get(target, ())) != len(keys):
            raise CheckpointError(f"{keys[0]} of {source} becomes {target}, and no export of it would be read as that")


def _has(plan: Plan, target: str, items: Sequence[tuple[str, str | None]]) -> bool:
    """Whether the model has it of its own: a tied copy in the file is not exported again."""
    return target in plan.plain or items[0][1] is not None
