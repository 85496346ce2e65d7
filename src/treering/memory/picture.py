"""A forecast of memory as a table and bars, in plain text."""

from collections.abc import Sequence

from treering.memory.forecast import Peak
from treering.memory.timeline import PHASES
from treering.memory.tracker import CATEGORIES, Category
from treering.plan.explain import size

WIDTH = 64  # of a bar
GIB = 2**30
# Letters instead of colours, so that a bar is readable in a log file.
LETTERS: dict[Category, str] = {
    "parameters": "P",
    "technique": "T",
    "optimizer": "O",
    "gradients": "G",
    "gathered": "g",
    "activations": "A",
    "loss": "L",
    "workspace": "w",
}
MEANS: dict[Category, str] = {
    "parameters": "this rank's share, as stored",
    "technique": "parameters and buffers of techniques",
    "optimizer": "the optimizer's state",
    "gradients": "summed ones, and those being summed",
    "gathered": "parameters of other ranks, while they are used",
    "activations": "kept from the forward for the backward",
    "loss": "head, logits and their gradients",
    "workspace": "allocated and freed within a block",
}


def table(peak: Peak) -> list[str]:
    """Return the lines of a table: GiB of each category at the worst moment of each phase."""
    lines = [f"{'GiB':<14}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for category in CATEGORIES:
        row = [peak.phases[phase][category] / GIB for phase in PHASES]
        if max(row) >= 0.005:
            cells = "".join(f"{value:10.2f}" if value >= 0.005 else f"{'–':>10}" for value in row)
            lines.append(f"{LETTERS[category]} {category:<12}{cells}   {MEANS[category]}")
    sums = "".join(f"{sum(peak.phases[phase].values()) / GIB:10.2f}" for phase in PHASES)
    return [*lines, f"{'together':<14}{sums}"]


def bars(peak: Peak, limit: float | None) -> list[str]:
    """Return a bar for each phase, with `|` where the memory of the device ends."""
    worst = peak.device
    scale = WIDTH / max(worst, limit or 0.0)
    edge = None if limit is None else round(limit * scale)
    return [f"{phase:<9}{_bar(peak, phase, scale, edge)}" for phase in PHASES]


def _bar(peak: Peak, phase: str, scale: float, edge: int | None) -> str:
    """Return one bar. Each category ends at a rounded position, so that rounding errors do not add up."""
    drawn, total = "", 0.0
    parts = [("·", peak.reserved), *((LETTERS[c], peak.phases[phase][c]) for c in CATEGORIES)]  # type: ignore[index]
    for letter, size_of_part in parts:
        total += size_of_part
        drawn += letter * (round(total * scale) - len(drawn))
    if edge is None:
        return drawn
    return drawn.ljust(edge)[:edge] + "|" + drawn[edge:]


def verdict(peak: Peak, limit: float | None, length: int) -> str:
    """Return what `length` tokens need, and whether it fits into `limit` bytes."""
    need = f"{length:,} tokens need {peak.device / GIB:.1f} GiB on each rank"
    if limit is None:
        return need
    left = limit - peak.device
    return f"{need} of {limit / GIB:.1f}: " + (f"fits, {size(int(left))} to spare" if left >= 0 else "does NOT fit")


def content(peak: Peak) -> str:
    """Return the categories of the peak, the largest first."""
    phase = max(PHASES, key=lambda phase: sum(peak.phases[phase].values()))
    categories = [*peak.phases[phase].items(), ("reserved", peak.reserved)]
    parts = sorted((item for item in categories if item[1] >= 0.005 * GIB), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size(int(value))}" for name, value in parts)
    return f"at its peak, in {phase}: {listed or 'less than 0.01 GiB of anything'}"


def render(peak: Peak, limit: float | None, length: int, more: Sequence[str] = ()) -> str:
    """Return the complete text: verdict, table, bars, and the lines `more`."""
    lines = ["memory", f"  {verdict(peak, limit, length)}", f"  {content(peak)}", ""]
    lines += [f"  {line}" for line in table(peak)] + [""]
    lines += [f"  {line}" for line in bars(peak, limit)]
    lines += [f"  · {size(int(peak.reserved))} for the driver's context, libraries and message buffers, not traced", ""]
    if peak.host >= GIB / 100:
        lines.append(f"  host memory of each rank: {size(int(peak.host))}")
    return "\n".join([*lines, *(f"  {line}" for line in more)]).rstrip()
