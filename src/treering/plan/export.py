"""A Hugging Face folder of the dense or the quantized model, or a peft folder of an adapter: streamed, then published.

One group of tensors is gathered, joined, translated and written at a time, and all is read again. An error on rank 0
ends the export on all ranks. An adapter is exported alone only if its folder, with the original model, gives what was
trained; with `packed`, its folder is next to the weights that it was trained on.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from treering.core.collectives import is_first
from treering.core.errors import CheckpointError, PlanError
from treering.curvature import open as open_statistics
from treering.curvature.disk import copy_folder
from treering.plan.packed_export import check_reopened, describe, packed_tensors, publication_of, refuse_merging
from treering.plan.plan import Plan
from treering.plan.values import Values, announced, groups, joined, like, live_values, take_part
from treering.store.model_folder import tensor_files
from treering.store.publish import RunOnFirst, on_first, published, refuse_full, refuse_taken
from treering.store.tensor_writer import LIMIT, TensorWriter
from treering.technique import Adapter
from treering.weights.conversion import to_file_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from treering.weights.quantized.publication import Publication

NEXT_TO_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


ADAPTER = "adapter"  # the folder of an adapter in that of its quantized weights
Experts = Literal["stacked", "each"]
Contents = Iterator[tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Mapping[str, Tensor]]]]


def export(
    plan: Plan,
    folder: Path,
    adapter: str | None,
    *,
    packed: bool = False,
    experts: Experts = "stacked",
    values: Values | None = None,
    files: Mapping[str, Path] | None = None,
    statistics: Path | None = None,
    limit: int = LIMIT,
    extra: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write the model, or the adapter named `adapter`, and return the folder. Every rank calls it.

    Args:
        plan: The model and its techniques.
        folder: Where to write; it must not exist or be empty.
        adapter: The name of the adapter to write; None: the model.
        packed: Write quantized weights as codes and scales, in a layout that others read; with `adapter`, that is
            written into the folder `adapter` inside.
        experts: Of an adapter: `stacked`, as peft adapts the parameters of experts; `each`, a pair for each expert
            under its published name, as engines want that serve unstacked experts.
        values: Those of a run that is not in memory; None: those of the live model.
        files: Name -> file to copy next to a model, instead of the base model's of that name.
        statistics: A folder of statistics to copy into a dense model's folder, as `statistics`.
        limit: Bytes of one file.
        extra: Writes more files into the folder, on rank 0, before it is published.
    """
    on_first(lambda: refuse_taken(folder), f"looking at {folder}")
    values = values or live_values(plan)
    publication = publication_of(plan) if packed else None
    chosen = None if adapter is None else exportable(plan, adapter, packed=packed)
    chosen = _for_experts(plan, chosen, experts)
    if publication is not None and chosen is None:
        refuse_merging(plan, values)
    writers: list[tuple[str, TensorWriter, Contents]] = []
    if publication is not None:
        contents = packed_tensors(plan, values, publication)
        writers.append(("", TensorWriter(packed_layout(plan, publication), limit=limit), contents))
    elif chosen is None:
        writers.append(("", TensorWriter(layout(plan), limit=limit), _dense(plan, values)))
    if chosen is not None:
        writer = TensorWriter(adapter_layout(plan, chosen), file=chosen.file, limit=None)
        unchanged = ((tensors, dict) for tensors in adapter_tensors(chosen, values))
        writers.append((ADAPTER if packed else "", writer, unchanged))
    measured = None if statistics is None else open_statistics(statistics)
    need = sum(writer.bytes for _, writer, _ in writers) + (measured.bytes if measured else 0)
    on_first(lambda: refuse_full(folder, need), f"looking at {folder}")
    with published(folder, need) as (temporary, do):
        for place, writer, contents in writers:
            _write(writer, temporary / place, contents, do)
        if measured is not None:
            do(lambda: copy_folder(Path(measured.where), temporary / "statistics"))
        if chosen is not None:
            base = folder.absolute() if packed else plan.source_name
            do(lambda: _describe_adapter(str(base), temporary / (ADAPTER if packed else ""), chosen))
        if publication is not None or chosen is None:
            do(lambda: extra(temporary))
            do(lambda: _describe(plan, writers[0][1], temporary, files or {}))
        if publication is not None:
            do(lambda: describe(plan, publication, temporary))
            do(lambda: check_reopened(publication, temporary))
    return folder


def layout(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of the dense model's files, on the meta device."""
    return {name: tensor for group in groups(plan) for name, tensor in announced(plan, group).items()}


def packed_layout(plan: Plan, publication: "Publication") -> dict[str, Tensor]:
    """Return the tensors of the quantized model's files, on the meta device."""
    plain = [name for name in plan.plain if name not in publication.packings]
    tensors = {name: tensor for group in groups(plan, plain) for name, tensor in announced(plan, group).items()}
    return tensors | {key: t for name in publication.packings for key, t in publication.announced(name).items()}


def _dense(plan: Plan, values: Values) -> Contents:
    first = is_first()
    convert = partial(to_file_layout, plan.model)
    for group in groups(plan):
        if first:
            yield {name: joined(plan, name, values).cpu() for name in group}, convert
        else:
            for name in group:
                take_part(plan, name, values)
            yield {}, convert


def _write(writer: TensorWriter, folder: Path, contents: Contents, do: RunOnFirst) -> None:
    def add(tensors: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
        for name, value in convert(tensors).items():
            writer.add(name, value)

    do(lambda: folder.mkdir(exist_ok=True))
    do(lambda: writer.open(folder))
    for tensors, convert in contents:
        do(partial(add, tensors, convert))
        tensors.clear()  # the loop would keep it while the next group is computed
    do(writer.close)
    do(writer.check)


def _describe(plan: Plan, writer: TensorWriter, folder: Path, files: Mapping[str, Path]) -> None:
    """Write everything but weights. The configuration is written last: without it the folder cannot be loaded."""
    if set(tensor_files(folder)) != set(writer.tensors):
        raise CheckpointError(f"{folder} and its index do not name the same tensors")
    for name in NEXT_TO_WEIGHTS:
        path = files.get(name) or (plan.folder / name if plan.folder is not None else None)
        if path is not None and path.is_file():
            shutil.copyfile(path, folder / name)
    generation = getattr(plan.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.save_pretrained(folder)
    config = _config(plan)
    config.save_pretrained(folder)
    _reopen_config(config, folder)


def _config(plan: Plan) -> "PretrainedConfig":
    """Return the configuration as transformers saves it: with the dtype and the class of the weights."""
    config = copy.deepcopy(plan.model.config)
    config.dtype = next(dtype for _, dtype in plan.plain.values())
    config.architectures = [type(plan.model).__name__.removeprefix("FSDP")]
    return config


def _reopen_config(written: "PretrainedConfig", folder: Path) -> None:
    """Check that the configuration is read as it was written. An unknown family has a class that transformers lacks."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if written.model_type in CONFIG_MAPPING:
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    else:
        read = type(written).from_pretrained(folder)
    if type(read) is not type(written) or read.architectures != written.architectures or read.dtype != written.dtype:
        raise CheckpointError(f"{folder}/config.json is read as another configuration than was written")


def _describe_adapter(base: str, folder: Path, chosen: Adapter) -> None:
    config = {**chosen.config, "base_model_name_or_path": base}
    (folder / chosen.config_file).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def exportable(plan: Plan, name: str, *, packed: bool = False) -> Adapter:
    """Return the adapter called `name`; raise PlanError if a folder of it would give another model.

    Args:
        packed: whether the weights that it was trained on are written next to it.
    """
    adapters = {a.adapter.name: a.adapter for a in plan.applied if a.adapter is not None}
    if name not in adapters:
        raise PlanError(f"there is no adapter called {name!r}; there is {', '.join(adapters) or 'none'}")
    chosen = adapters[name]
    if packed:
        return chosen
    moved = [n for n, chain in plan.chains.items() for p in chain.parts if p.moves_base and set(p.names) & chosen.own]
    if moved:
        raise PlanError(
            f"the adapter {name!r} moved the base weights at its start ({moved[0]} and {len(moved) - 1} more), so it "
            "does not fit the original model; export the dense model instead"
        )
    if chosen.only_with:
        raise PlanError(
            f"the adapter {name!r} fits {chosen.only_with} only, and not the original model; export the dense model "
            "instead"
        )
    others = [name for a in plan.applied for name in a.trainable if name not in chosen.own and name in plan.plain]
    if others:
        raise PlanError(
            f"{others[0]} and {len(others) - 1} more plain parameters were trained next to the adapter {name!r}, and "
            "an adapter folder cannot contain them; export the dense model instead"
        )
    return chosen


def _for_experts(plan: Plan, chosen: Adapter | None, experts: Experts) -> Adapter | None:
    """Return the adapter with a pair for each expert where that is asked for."""
    if experts == "stacked":
        return chosen
    if chosen is None or chosen.each_expert is None:
        raise PlanError(
            "experts: each writes the adapters of stacked experts one by one, and "
            + (
                "no adapter is exported; name one"
                if chosen is None
                else f"the adapter {chosen.name!r} has none; leave it out"
            )
        )
    derived, config = chosen.each_expert(plan.model)
    return replace(chosen, derived=derived, config=config)


def adapter_layout(plan: Plan, adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, on the meta device."""
    layout_of_file = {key: like(plan, name) for name, key in adapter.keys.items()}
    for key, derived in adapter.derived.items():
        layout_of_file[key] = torch.empty(derived.shape, dtype=like(plan, derived.names[0]).dtype, device="meta")
    return layout_of_file


@torch.no_grad()
def adapter_tensors(adapter: Adapter, values: Values) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of an adapter's file, one at a time; a collective where the model is sharded."""
    for name, key in adapter.keys.items():
        yield {key: values.read(name).cpu()}
    names: tuple[str, ...] = ()
    for key, derived in adapter.derived.items():
        if derived.names != names:  # one stack gives the tensors of many experts
            names, tensors = derived.names, {name: values.read(name) for name in derived.names}
        yield {key: derived.make(tensors).contiguous().cpu()}
