"""What `treering measure` prints: what it will write, a table of inputs, and what was measured of gradients."""

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.curvature import GradientSettings, Statistics
    from treering.plan import Run


def announce(run: "Run", gradients: "GradientSettings | None") -> None:
    """Print, before anything is measured, how large the factors will be on disk: they can be larger than the model."""
    from treering.cli.console import say
    from treering.cli.text import size
    from treering.core.collectives import is_first
    from treering.curvature.measuring_gradients import bytes_on_disk

    if gradients is not None and is_first():
        needed = bytes_on_disk(run.model, run.plan.anatomy, gradients)
        say(f"factors of gradients will take up to {size(needed)} on disk")


def report_gradients(statistics: "Statistics", anatomy: "Anatomy") -> None:
    """Print what was measured of gradients, and which share of the parameters that covers."""
    from treering.cli.console import say
    from treering.core.collectives import is_first

    factors = statistics.gradients
    if factors is None or not is_first():
        return
    facts = factors.settings
    say(f"gradients: {facts.kind} of {factors.documents:,} documents, {factors.tokens:,} tokens, {facts.labels} labels")
    sizes = {name: prod(parameter.shape) for name, parameter in anatomy.parameters.items()}
    covered, every = sum(sizes[weight] for weight in factors), sum(sizes.values())
    say(f"they cover {len(factors)} matrices: {covered / every:.1%} of {every:,} parameters")
    others = [name for name in sizes if name not in factors]
    reasons: Counter[str] = Counter()
    for name in others:
        reasons[factors.left_out.get(name, "not a matrix of a layer")] += sizes[name]
    for reason, number in reasons.most_common():
        say(f"  without factors: {number / every:.1%}, {reason}")


def table_of(statistics: "Statistics") -> None:
    """Print a row for each kind of matrix. Effective rank: (Σ e)² / Σ e² of the eigenvalues, without computing them."""
    from treering.cli.console import console, safe, say, table
    from treering.cli.text import count, size
    from treering.core.collectives import is_first

    if not is_first():
        return
    kinds: dict[str, list[str]] = {}
    for key in statistics.tensors:
        shared = [w for w, entry in statistics.entries.items() if entry.key == key]
        names = [w.removesuffix(".weight").rpartition(".")[2] for w in shared]
        kinds.setdefault(" ".join(names), []).append(key)
    listing = table("inputs of", "times", "width", "tokens", "effective rank", "size", right=("times", "width"))
    for kind, keys in kinds.items():
        entries = [statistics.tensors[key] for key in keys]
        tokens = sorted(t for e in entries for t in (e.tokens if isinstance(e.tokens, tuple) else (e.tokens,)))
        ranks = sorted(rank for key in keys for rank in _ranks(statistics, key))
        widths = sorted({entry.shape[-1] for entry in entries})
        listing.add_row(
            safe(kind), str(len(keys)), ", ".join(map(str, widths)), _range(tokens), _range([round(r) for r in ranks]),
            size(sum(4 * prod(entry.shape) for entry in entries)),
        )  # fmt: skip
    console().print(listing)
    for ring in statistics.rings:
        say(f"measurement {ring.name}: {ring.tokens:,} tokens{f', {ring.date}' if ring.date else ''}")
    say(f"wrote {statistics.where}: {count(len(statistics.entries), 'weight')}, {size(statistics.bytes)}")


def _ranks(statistics: "Statistics", key: str) -> list[float]:
    matrix = statistics[key]["inputs"].double()
    traces, squares = matrix.diagonal(dim1=-2, dim2=-1).sum(-1), matrix.square().sum((-2, -1))
    return (traces.square() / squares.clamp_min(1e-300)).reshape(-1).tolist()


def _range(values: list[int]) -> str:
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,}–{values[-1]:,}"
