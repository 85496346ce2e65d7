"""`treering inspect`: what a folder is (model, adapter, checkpoint, run) and its contents, from headers and JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from treering.cli.saved import TensorDescription, damage, describe_saved
from treering.cli.text import count, masked, plain, short, size
from treering.core.errors import CheckpointError
from treering.store.untrusted import Header, basename, read_header, read_json

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp")
Kind = Literal["model", "adapter", "checkpoint", "run", "folder of safetensors", "folder"]


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors that differ only in numbers within their names."""

    name: str
    times: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """The kind of a folder and its contents."""

    kind: Kind
    facts: dict[str, str]
    rows: tuple[TensorGroup, ...] = ()
    warnings: list[str] = field(default_factory=list)
    damage: tuple[str, ...] = ()  # of a checkpoint: why it would not be loaded


def command(
    folder: Annotated[Path, typer.Argument(help="A model, adapter, checkpoint or run.", show_default=False)],
    full: Annotated[bool, typer.Option("--full", help="Every group of tensors, however many.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of a checkpoint and compare its digests.")] = False,
) -> None:
    """Show what FOLDER is and contains. Reads headers and JSON only (--verify: every byte), and never pickle."""
    from treering.cli.console import console, safe, say, table

    report = describe(folder, verify)
    say(f"{folder}: {report.kind}")
    width = max(map(len, report.facts), default=0)
    for name, value in report.facts.items():
        say(f"  {name:<{width}}  {value}")
    for warning in report.warnings:
        say(f"  ! {warning}", "yellow")
    if report.rows:
        listing = table("tensor", "times", "dtype", "shape", "size", right=("times", "size"))
        rows = report.rows if full else report.rows[:40]
        for row in rows:
            shape = " × ".join(map(str, row.shape)) or "scalar"
            listing.add_row(safe(short(row.name, 100)), str(row.times), row.dtype, shape, size(row.bytes))
        console().print(listing)
        if len(rows) < len(report.rows):
            say(f"… and {len(report.rows) - len(rows)} more groups; --full shows them")
    if report.damage:
        more = f" (and {len(report.damage) - 1} more)" if len(report.damage) > 1 else ""
        raise CheckpointError(f"{report.damage[0]}{more}; this checkpoint is never loaded")


def describe(folder: Path, verify: bool = False) -> FolderReport:
    """Return a report on `folder`. `verify`: read every byte of a checkpoint, and compare it with the digests."""
    if not folder.is_dir():
        missing = "it is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{plain(str(folder))}: {missing}; give the folder of a model, an adapter or a run")
    warnings = _warnings(folder)
    if _regular(folder / "manifest.json"):
        return _checkpoint(folder, warnings, verify)
    if verify:
        raise CheckpointError(f"{plain(str(folder))} is not a checkpoint; only those have digests to --verify")
    if _regular(folder / "adapter_config.json"):
        return _adapter(folder, warnings)
    if _regular(folder / "config.json"):
        return _model(folder, warnings)
    if _regular(folder / "metrics.jsonl") or _steps(folder):
        return _run(folder, warnings)
    tensors = _tensors(folder, warnings)
    if tensors:
        return FolderReport(
            kind="folder of safetensors", facts=_totals(tensors), rows=_rows(tensors), warnings=warnings
        )
    names = sorted(f.name for f in folder.iterdir())
    some = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return FolderReport(kind="folder", facts={"files": plain(some) or "none"}, warnings=warnings)


def _model(folder: Path, warnings: list[str]) -> FolderReport:
    config = read_json(folder / "config.json")
    facts = _some(
        config,
        ("model_type", "architectures", "num_hidden_layers", "hidden_size", "vocab_size", "dtype", "torch_dtype"),
    )
    if "auto_map" in config:
        warnings.append("config.json names Python code (auto_map): it is never run")
    facts |= _quantization(folder, warnings)
    tensors = _tensors(folder, warnings)
    if not tensors:
        warnings.append("there are no safetensors files: only the structure can be used")
    return FolderReport(kind="model", facts={**facts, **_totals(tensors)}, rows=_rows(tensors), warnings=warnings)


def _quantization(folder: Path, warnings: list[str]) -> dict[str, str]:
    """Return the method and the number formats of quantized weights; what cannot be read of them is a warning."""
    from treering.weights.quantized.folder import count as counted
    from treering.weights.quantized.opened import open_quantized, quantization

    described = quantization(folder)
    if described is None:
        return {}
    method = short(str(described.get("quant_method", "modelopt" if "quantization" in described else "unnamed")))
    try:
        quantized = open_quantized(folder)
    except CheckpointError as error:
        warnings.append(plain(str(error)))
        return {"quantization": method}
    assert quantized is not None
    kinds = counted(weight.form.label for weight in quantized.weights.values())
    ignored = f"; {len(quantized.ignored)} scales of activations" if quantized.ignored else ""
    return {"quantization": f"{method}: {kinds}{ignored}"}


def _adapter(folder: Path, warnings: list[str]) -> FolderReport:
    config = read_json(folder / "adapter_config.json")
    keys = (
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "init_lora_weights",
    )
    tensors = _tensors(folder, warnings)
    if not tensors:
        warnings.append("adapter_model.safetensors is missing: there is nothing to load")
    return FolderReport(
        kind="adapter", facts={**_some(config, keys), **_totals(tensors)}, rows=_rows(tensors), warnings=warnings
    )


def _checkpoint(folder: Path, warnings: list[str], verify: bool) -> FolderReport:
    facts, tensors = describe_saved(folder)
    problems = tuple(damage(folder, verify))
    if verify and not problems:
        facts["verified"] = "every block of every file is what was written"
    return FolderReport(
        kind="checkpoint",
        facts={**facts, **_totals(tensors)},
        rows=_rows(tensors),
        warnings=warnings,
        damage=problems,
    )


def _run(folder: Path, warnings: list[str]) -> FolderReport:
    facts: dict[str, str] = {}
    steps = _steps(folder)
    if steps:
        facts["checkpoints"] = ", ".join(str(n) for n in steps[-8:])
    if _regular(folder / "metrics.jsonl"):
        facts |= {f"last {k}": v for k, v in _last_metrics(folder / "metrics.jsonl").items()}
    configs = [f.name for f in sorted(folder.glob("*.yaml")) if _regular(f)]
    if configs:
        facts["configuration"] = plain(", ".join(configs[:4]))
    return FolderReport(kind="run", facts=facts, warnings=warnings)


def _steps(folder: Path) -> list[int]:
    names = [f.name for place in (folder, folder / "checkpoints") if place.is_dir() for f in place.iterdir()]
    return sorted({int(m.group(1)) for name in names if (m := re.fullmatch(r"step-([0-9]{1,12})", name))})


def _last_metrics(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 65536))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    for line in reversed(lines):  # the last may be half written, others are notes
        try:
            metrics = _mapping(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if "loss" in metrics:
            return _some(metrics, tuple(metrics)[:8])
    return {}


def _tensors(folder: Path, warnings: list[str]) -> list[Header]:
    files = _safetensors(folder)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if not _regular(index):
            continue
        for name in sorted({basename(n, index) for n in _mapping(read_json(index).get("weight_map")).values()}):
            if folder / name not in files:
                warnings.append(f"{plain(index.name)} names {plain(name)}, which is missing")
    tensors = [tensor for file in files for tensor in read_header(file)]
    twice = [name for name, times in Counter(t.name for t in tensors).items() if times > 1]
    if twice:
        warnings.append(f"{count(len(twice), 'tensor')} in more than one file, first {short(twice[0])}")
    return tensors


def _safetensors(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.glob("*.safetensors")) if _regular(f)]


def _totals(tensors: Iterable[Header | TensorDescription]) -> dict[str, str]:
    tensors = list(tensors)
    if not tensors:
        return {}
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.bytes
    return {
        "tensors": f"{len(tensors):,}, {sum(t.elements for t in tensors):,} values",
        "size": ", ".join(f"{size(n)} {dtype}" for dtype, n in dtypes.most_common()),
    }


def _rows(tensors: Iterable[Header | TensorDescription]) -> tuple[TensorGroup, ...]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[Header | TensorDescription]] = {}
    for tensor in tensors:
        # `model.layers.17.mlp` and `model.layers.3.mlp` are one row.
        name = re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", tensor.name)
        groups.setdefault((name, tensor.dtype, tensor.shape), []).append(tensor)
    return tuple(
        TensorGroup(
            name=group[0].name if len(group) == 1 else name,
            times=len(group),
            dtype=dtype,
            shape=shape,
            bytes=sum(t.bytes for t in group),
        )
        for (name, dtype, shape), group in groups.items()
    )


def _warnings(folder: Path) -> list[str]:
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(PICKLES) or f.name == ".metadata")
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return [f"may be pickle, never read: {plain(shown)}"] if names else []


def _some(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, str]:
    return {plain(k)[:40]: short(str(masked(k, values[k])), 100) for k in keys if values.get(k) is not None}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _regular(file: Path) -> bool:
    return file.is_file()  # a pipe or device, even behind a link, would block or never end
