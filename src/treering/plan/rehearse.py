"""A trial of the export before the first step, so that a run of days does not fail at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from treering.core.errors import CheckpointError, PlanError
from treering.plan.export import adapter_layout, exportable, layout
from treering.plan.plan import Plan
from treering.plan.values import announced, groups, joined, live_values
from treering.store.publish import on_first, refuse_full
from treering.store.tensor_writer import size
from treering.weights.conversion import places, to_file_layout
from treering.weights.plain_tensors import Source


def rehearse(plan: Plan, folder: Path) -> None:
    """Join and translate one block of the live model, compare with the source's files, and check the space at `folder`.

    Every rank calls it, once the weights are loaded. `folder` may exist already.
    """
    expected = layout(plan)
    on_first(lambda: refuse_full(folder, _least(plan, expected)), f"checking the space at {folder}")
    values = live_values(plan)
    for group in groups(plan, _one_block(plan)):
        tensors = {name: joined(plan, name, values).cpu() for name in group}
        on_first(lambda group=group, tensors=tensors: _check(plan, group, tensors), "rehearsing the export")  # type: ignore[misc]
    if plan.source is not None and plan.source.live_values is None:
        source = plan.source
        on_first(lambda: _compare(plan, expected, source), f"comparing the export with {source.where}")


def _one_block(plan: Plan) -> list[str]:
    block = plan.anatomy.blocks[0].fqn + "."
    return [name for name in plan.plain if name.startswith(block)]


def _least(plan: Plan, expected: Mapping[str, Tensor]) -> int:
    """Return the bytes of the smallest export: of the adapters if each can be exported alone, else of the model."""
    need = 0
    for applied in plan.applied:
        if applied.parts and applied.adapter is None:
            return sum(map(size, expected.values()))
        if applied.adapter is not None:
            try:
                chosen = exportable(plan, applied.adapter.name)
            except PlanError:
                return sum(map(size, expected.values()))
            need += sum(map(size, adapter_layout(plan, chosen).values()))
    return need or sum(map(size, expected.values()))


def _check(plan: Plan, group: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} would be exported with values that are not finite")
    wanted = {key: (tuple(t.shape), t.dtype) for key, t in announced(plan, group).items()}
    exported = {key: (tuple(t.shape), t.dtype) for key, t in to_file_layout(plan.model, tensors).items()}
    if exported != wanted:
        wrong = sorted(key for key in exported.keys() | wanted.keys() if exported.get(key) != wanted.get(key))[0]
        raise CheckpointError(
            f"{wrong} would be exported as {exported.get(wrong)}; the folder needs {wanted.get(wrong)}"
        )


def _compare(plan: Plan, expected: Mapping[str, Tensor], source: Source) -> None:
    """Refuse an export that would not be read as the same tensors. Names and dtypes may differ from the source's."""
    for name in sorted(set(expected) & set(source.shapes)):
        if source.shapes[name] != tuple(expected[name].shape):
            raise CheckpointError(
                f"{name} would be exported with shape {tuple(expected[name].shape)}; {source.where} has "
                f"{source.shapes[name]}"
            )
    names = dict(plan.plain)
    before, _ = places(plan.model, source.shapes, names)
    after, _ = places(plan.model, expected, names)
    unused = set(source.unused)
    for target, items in before.items():
        keys = [key for key, _ in items if key not in unused]
        if _has(plan, target, items) and keys and len(after.get(target, ())) != len(keys):
            raise CheckpointError(
                f"{keys[0]} of {source.where} becomes {target}, and no export of it would be read as that"
            )


def _has(plan: Plan, target: str, items: Sequence[tuple[str, str | None]]) -> bool:
    """Return whether the model has `target` as a separate tensor: a tied copy in the file is not exported again."""
    return target in plan.plain or items[0][1] is not None
