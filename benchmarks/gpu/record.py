"""From what a row measured to the JSON rows of the other benchmarks, with what is special about a card.

The fields of `benchmarks.rows.Row`, and besides: which row it belongs to, the device, whether it was a dry run, and why
a row failed, if it did. `ours` is null where nothing could be measured.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, row

PACKAGES = ("torch", "transformers", "safetensors", "numpy")
MESSAGE = 400  # characters of an error that are kept
Values = Sequence[float | None] | float | int | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure. `ours` and `peer` are runs; of a pair of equally many, the median ratio of pairs counts."""

    figure: str
    case: str
    ours: Values
    peer: Values = None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class CardRow(Row):
    """A row of results, and where it was measured."""

    row: str  # the name that `--rows` takes
    device: str
    dry: bool
    failed: str | None = None


def measured(figure: Figure, name: str, *, device: str, dry: bool, command: str) -> CardRow:
    """Return the row of a figure: medians, the ratio and whether the bar holds."""
    ours, peer = _numbers(figure.ours), _numbers(figure.peer)
    made = row(
        figure.figure, figure.case, ours or [0.0], peer if ours else [], unit=figure.unit, at_least=figure.at_least,
        at_most=figure.at_most, packages=PACKAGES, command=command,
    )  # fmt: skip
    made = replace(made, versions=made.versions | _versions())
    if not ours:
        made = replace(made, ours=None, peer=statistics.median(peer) if peer else None, holds=False, runs=0)
    elif len(ours) == len(peer) > 1:
        ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
        made = replace(made, ratio=ratio, holds=_holds(ratio, figure))
    return CardRow(**asdict(made), row=name, device=device, dry=dry)


def failed(name: str, message: str, *, device: str, dry: bool, command: str) -> CardRow:
    """Return the row of something that could not be measured, and why."""
    figure = Figure(figure=name, case="not measured", ours=None)
    made = measured(figure, name, device=device, dry=dry, command=command)
    return replace(made, failed=" ".join(message.split())[:MESSAGE] or "no message")


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows. A process that is killed at any moment leaves the file of before or of now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(list(rows), indent=1) + "\n", "utf-8")
    os.replace(half, path)


def line(entry: dict[str, Any]) -> str:
    """One row of the printed table."""
    if entry["failed"]:
        return f"{entry['row']:<12} | FAILED: {entry['failed']}"
    ours = "not measured" if entry["ours"] is None else f"{entry['ours']:.4g} {entry['unit']}"
    peer = "" if entry["peer"] is None else f" | peer {entry['peer']:.4g}"
    ratio = "" if entry["ratio"] is None else f" | ratio {entry['ratio']:.3f}"
    verdict = "" if not entry["bar"] else f" | {entry['bar']}: {'holds' if entry['holds'] else 'MISSED'}"
    if entry["dry"] and verdict:
        verdict = f" | {entry['bar']}"
    return f"{entry['row']:<12} | {entry['figure']} | {entry['case']} | {ours}{peer}{ratio}{verdict}"


def _numbers(values: Values) -> list[float]:
    if isinstance(values, int | float):
        return [float(values)]
    return [] if values is None else [float(value) for value in values if value is not None]


def _holds(value: float, figure: Figure) -> bool:
    over = figure.at_least is None or value >= figure.at_least
    return over and (figure.at_most is None or value <= figure.at_most)


def _versions() -> dict[str, str]:
    """What no package's metadata says; only the process that computes has torch."""
    if "torch" not in sys.modules:
        return {}
    import torch

    import treering

    return {"treering": treering.__version__, "cuda": torch.version.cuda or "none"}
