"""Plain tensors out: the same joins over the live tensors, gathered one group at a time."""

import copy
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from treering.errors import CheckpointError, PlanError
from treering.folders import Writer
from treering.plan.fill import join
from treering.plan.place import gather
from treering.plan.plan import Plan
from treering.together import from_first, is_first, together
from treering.weights import export_groups, to_file_layout

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


def plain(plan: Plan, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each plain tensor as the chain reproduces it now, in its stored dtype."""
    live = plan.live()
    for name in names if names is not None else plan.plain:
        shape, dtype = plan.plain[name]
        chain = plan.chains.get(name)
        base = gather(live[name]) if name in live else torch.zeros(shape, dtype=dtype)
        if chain is None:
            yield name, base
            continue
        tensors = {own: gather(live[own]) for part in chain.parts for own in part.names}
        yield name, join(chain.parts, tensors, base).to(dtype)


def export(plan: Plan, folder: Path, adapter: str | None) -> Path:
    """Written beside `folder` under another name and moved there whole: a killed export leaves nothing to load."""
    first = is_first()
    state = together(lambda: free(folder), f"looking at {folder}")[0]
    if state:
        raise CheckpointError(f"{folder} is {state}; give an export a folder of its own")
    temporary = folder.with_name(f"{folder.name}.tmp-{from_first(uuid.uuid4().hex[:8])}")
    together(lambda: temporary.mkdir(parents=True) if first else None, f"making {temporary}")
    try:
        if adapter is None:
            _dense(plan, temporary, first)
        else:
            _adapter(plan, temporary, adapter, first)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if first:
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def free(folder: Path) -> str:
    """Why nothing can be exported to `folder`; empty if it can."""
    if folder.exists() and not folder.is_dir():
        return "a file"
    return "not empty" if folder.is_dir() and any(folder.iterdir()) else ""


def _dense(plan: Plan, folder: Path, first: bool) -> None:
    writer = Writer(folder)
    for group in export_groups(plan.model, plan.plain):
        tensors = {name: value.cpu() for name, value in plain(plan, group)}
        if first:
            for name, value in to_file_layout(plan.model, tensors).items():
                writer.add(name, value)
    if not first:
        return
    writer.close()
    _config(plan).save_pretrained(folder)
    for name in BESIDE:
        beside = plan.folder / name if plan.folder is not None else None
        if beside is not None and beside.is_file():
            shutil.copy(beside, folder / name)
    generation = getattr(plan.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.save_pretrained(folder)


def _config(plan: Plan) -> "PretrainedConfig":
    """As transformers writes it beside weights: with the dtype they have and the class that they are of."""
    config = copy.deepcopy(plan.model.config)
    config.dtype = next(dtype for _, dtype in plan.plain.values())
    config.architectures = [type(plan.model).__name__.removeprefix("FSDP")]
    return config


def _adapter(plan: Plan, folder: Path, name: str, first: bool) -> None:
    from safetensors.torch import save_file

    adapters = {a.adapter.name: a.adapter for a in plan.applied if a.adapter is not None}
    if name not in adapters:
        raise PlanError(f"there is no adapter called {name!r}; there is {', '.join(adapters) or 'none at all'}")
    chosen = adapters[name]
    moved = [
        n for n, chain in plan.chains.items() for p in chain.parts if p.moves_base and set(p.names) & set(chosen.keys)
    ]
    if moved:
        raise PlanError(
            f"the adapter {name!r} moved the base weights at its start ({moved[0]} and {len(moved) - 1} more), so it "
            "does not fit the original model; export the dense model instead"
        )
    beside = [name for a in plan.applied for name in a.trainable if name not in chosen.keys and name in plan.plain]
    if beside:
        raise PlanError(
            f"{beside[0]} and {len(beside) - 1} more plain parameters were trained beside the adapter {name!r}, and an "
            "adapter folder cannot hold them; export the dense model instead"
        )
    live = plan.live()
    tensors = {key: gather(live[own]).cpu().contiguous() for own, key in chosen.keys.items()}
    if first:
        save_file(tensors, folder / chosen.file, metadata={"format": "pt"})
        config = {**chosen.config, "base_model_name_or_path": plan.source_name}
        (folder / chosen.config_file).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
