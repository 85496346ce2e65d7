"""The rows every benchmark writes, and the table it prints."""

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """`bar` is the goal for `ratio` (or for `ours`, without a peer); a missed bar stays in the file as missed."""

    figure: str
    case: str
    ours: float | None  # None: it could not be measured
    peer: float | None
    ratio: float | None
    unit: str
    bar: str
    holds: bool
    runs: int
    spread: float  # (largest − smallest) / median of our runs
    versions: dict[str, str]
    command: str
    date: str


def row(
    figure: str,
    case: str,
    ours: Sequence[float],
    peer: Sequence[float] = (),
    *,
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
    packages: Sequence[str] = (),
    command: str,
) -> Row:
    """Medians of the runs. `ratio` is ours / peer; the bar holds for it, or for ours where there is no peer."""
    mine = statistics.median(ours)
    theirs = statistics.median(peer) if peer else None
    ratio = mine / theirs if theirs else None
    judged = mine if ratio is None else ratio
    holds = (at_least is None or judged >= at_least) and (at_most is None or judged <= at_most)
    bars = [f">= {at_least}" if at_least is not None else "", f"<= {at_most}" if at_most is not None else ""]
    return Row(
        figure=figure,
        case=case,
        ours=mine,
        peer=theirs,
        ratio=ratio,
        unit=unit,
        bar=" and ".join(filter(None, bars)),
        holds=holds,
        runs=len(ours),
        spread=(max(ours) - min(ours)) / mine if mine else 0.0,
        versions={"python": platform.python_version(), **{name: _version(name) for name in packages}},
        command=command,
        date=datetime.now(UTC).date().isoformat(),
    )


def write(name: str, machine: str, rows: Sequence[Row]) -> Path:
    """Write `results/NAME.MACHINE.json` and print the rows as a table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.{machine}.json"
    path.write_text(json.dumps([asdict(entry) for entry in rows], indent=1) + "\n", "utf-8")
    for entry in rows:
        peer = "" if entry.peer is None else f" | peer {entry.peer:.4g} | ratio {entry.ratio:.3f}"
        verdict = "" if not entry.bar else f" | {entry.bar}: {'holds' if entry.holds else 'MISSED'}"
        sys.stdout.write(f"{entry.figure} | {entry.case} | {entry.ours:.4g} {entry.unit}{peer}{verdict}\n")
    return path


def others(name: str, machine: str, made: Sequence[Row]) -> list[Row]:
    """Return what an earlier run found of the figures that `made` does not have."""
    path = RESULTS / f"{name}.{machine}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else []
    figures = {one.figure for one in made}
    return [Row(**one) for one in known if one["figure"] not in figures]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
