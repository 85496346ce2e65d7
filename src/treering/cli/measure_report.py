"""What `treering measure` prints: what it will write, a table of inputs, and what was measured of gradients."""

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

EXACT, PROJECTED = "exact", "projected on the side of the vocabulary"

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.curvature import GradientFactors, GradientSettings, Statistics
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
    shares: Counter[str] = Counter()
    for name, how in coverage(factors, anatomy).items():
        shares[how] += sizes[name]
    every = sum(sizes.values())
    say(f"they cover {len(factors)} matrices: of {every:,} parameters")
    for how, number in sorted(shares.items(), key=lambda one: (one[0] not in (EXACT, PROJECTED), -one[1])):
        say(f"  {number / every:.1%} {how if how in (EXACT, PROJECTED) else f'without factors: {how}'}")


def coverage(factors: "GradientFactors", anatomy: "Anatomy") -> dict[str, str]:
    """Return of each parameter whether its factors are `EXACT` or `PROJECTED`, or why it has none."""
    from treering.curvature.targets import biases_of, plain_sizes

    biases, plain = biases_of(anatomy), plain_sizes(anatomy)
    found: dict[str, str] = {}
    for name, one in factors.items():
        outputs, inputs = (factors.entries[one.keys[side]].shape[-1] for side in ("gradients", "inputs"))
        shape = plain.get(name, anatomy.parameters[name].shape)
        projected = ("counts" in one.keys and inputs < shape[0]) or (name in plain and outputs < shape[0])
        found[name] = PROJECTED if projected else EXACT
        if name in biases and inputs == shape[1] + 1:
            found[biases[name]] = found[name]
    return {n: found.get(n, factors.left_out.get(n, "not a matrix of a layer")) for n in anatomy.parameters}


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
