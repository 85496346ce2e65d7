"""A Hugging Face folder of the dense model, or a peft folder of an adapter: streamed, read again, then published.

One group of tensors is gathered, joined, translated and written at a time. What fails on rank 0 ends all.
"""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from treering.core.collectives import is_first
from treering.core.errors import CheckpointError
from treering.curvature import open as open_statistics
from treering.curvature.disk import copy_folder
from treering.plan.adapter import contents, exportable
from treering.plan.adapter import tensors as tensors_of
from treering.plan.plan import Plan
from treering.plan.values import Values, announced, groups, joined, live_values, take_part
from treering.store.model_folder import tensor_files
from treering.store.publish import on_first, published, refuse_full, refuse_taken
from treering.store.tensor_writer import LIMIT, TensorWriter
from treering.technique import Adapter
from treering.weights.plain_tensors import to_file_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BESIDE = (
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


def export(
    plan: Plan,
    folder: Path,
    adapter: str | None,
    *,
    values: Values | None = None,
    beside: Mapping[str, Path] | None = None,
    statistics: Path | None = None,
    limit: int = LIMIT,
) -> Path:
    """Write the model, or the adapter named `adapter`, as a folder. Every rank calls it. Returns the folder.

    values   of a run that is not in memory; else those of the live model
    beside   name -> file that comes with a dense model, instead of the base model's of that name
    statistics   a folder of them that comes with a dense model, as `statistics` in its folder
    limit    bytes of one file
    """
    on_first(lambda: refuse_taken(folder), f"looking at {folder}")
    values = values or live_values(plan)
    if adapter is None:
        writer = TensorWriter(layout(plan), limit=limit)
        coming = _dense(plan, values)
    else:
        chosen = exportable(plan, adapter)
        writer = TensorWriter(contents(plan, chosen), file=chosen.file, limit=None)
        coming = tensors_of(chosen, values)
    measured = None if statistics is None else open_statistics(statistics)
    need = writer.bytes + (measured.bytes if measured else 0)
    on_first(lambda: refuse_full(folder, need), f"looking at {folder}")
    with published(folder, need) as (temporary, do):
        do(lambda: writer.open(temporary))
        for tensors in coming:
            do(lambda tensors=tensors: _write(plan, writer, tensors, adapter is None))  # type: ignore[misc]
            tensors.clear()  # the loop would keep it while the next group is computed
        do(writer.close)
        do(writer.check)
        if measured is not None:
            do(lambda: copy_folder(Path(measured.where), temporary / "statistics"))
        if adapter is None:
            do(lambda: _describe(plan, writer, temporary, beside or {}))
        else:
            do(lambda: _describe_adapter(plan, temporary, chosen))
    return folder


def layout(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of the dense model's files, on the meta device."""
    return {name: tensor for group in groups(plan) for name, tensor in announced(plan, group).items()}


def _dense(plan: Plan, values: Values) -> Iterator[dict[str, Tensor]]:
    first = is_first()
    for group in groups(plan):
        if first:
            yield {name: joined(plan, name, values).cpu() for name in group}
        else:
            for name in group:
                take_part(plan, name, values)
            yield {}


def _write(plan: Plan, writer: TensorWriter, tensors: dict[str, Tensor], translate: bool) -> None:
    for name, value in (to_file_layout(plan.model, tensors) if translate else tensors).items():
        writer.add(name, value)


def _describe(plan: Plan, writer: TensorWriter, folder: Path, beside: Mapping[str, Path]) -> None:
    """Write everything but weights. The configuration is the last: without it nobody loads the folder."""
    if set(tensor_files(folder)) != set(writer.tensors):
        raise CheckpointError(f"{folder} and its index do not name the same tensors")
    for name in BESIDE:
        path = beside.get(name) or (plan.folder / name if plan.folder is not None else None)
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
    """Check that the configuration is read as it was written. An unknown family has its own class."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if written.model_type in CONFIG_MAPPING:
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    else:
        read = type(written).from_pretrained(folder)
    if type(read) is not type(written) or read.architectures != written.architectures or read.dtype != written.dtype:
        raise CheckpointError(f"{folder}/config.json is read as another configuration than was written")


def _describe_adapter(plan: Plan, folder: Path, chosen: Adapter) -> None:
    config = {**chosen.config, "base_model_name_or_path": plan.source_name}
    (folder / chosen.config_file).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
