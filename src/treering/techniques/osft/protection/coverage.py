"""The amount of text that was measured for each weight: weights without any are refused, weights with little cause a
warning.

A direction that no token used is trainable. That is the point of measuring, as long as there were tokens: of a matrix
that saw none, or fewer than it has inputs, most directions are unused because too little was measured.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treering.anatomy.matrices import Matrix
from treering.core.errors import PlanError
from treering.curvature import Statistics
from treering.curvature.counts import ENOUGH, TokenCounts, counted, tokens_of

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


def refuse_unmeasured(config: "OSFTSettings", chosen: Sequence[Matrix], statistics: Any) -> None:
    """Raise a PlanError where nothing was measured, or, with `unmeasured: refuse`, nothing of a matrix."""
    counts = counted(chosen, statistics)
    if counts and not any(n for numbers in counts.values() for n in numbers):
        raise PlanError(
            "osft: the statistics were measured on no token at all (was it padding alone?), so nothing would be "
            "protected. Measure text that represents what must be kept: treering measure MODEL --data FILE --to DIR",
            settings=("statistics.path",),
        )
    empty = unmeasured(counts)
    if not empty or config.unmeasured != "refuse" or config.protect == "weights":
        return
    raise PlanError(
        f"osft: no token of the measured text reached {_reached(empty, counts)}, so nothing about them is known that "
        "could be protected. Measure more text, or text that reaches them (treering measure --tokens N), or set "
        "osft.unmeasured: freeze (these are not trained) or unprotected (these are trained without protection)",
        settings=("statistics.path", "techniques.osft.unmeasured"),
    )


def unmeasured(counts: TokenCounts) -> TokenCounts:
    """Return, by weight, which of its matrices saw no token; weights without such are left out."""
    empty = {weight: tuple(i for i, n in enumerate(numbers) if n == 0) for weight, numbers in counts.items()}
    return {weight: numbers for weight, numbers in empty.items() if numbers}


def frozen(config: "OSFTSettings", statistics: Mapping[str, Tensor] | None) -> Tensor | None:
    """Return which matrices of one weight are frozen, because nothing about them is known; None: all are trained."""
    tokens = tokens_of(statistics) if config.unmeasured == "freeze" and config.protect != "weights" else None
    return None if tokens is None or bool((tokens != 0).all()) else (tokens == 0).reshape(-1)


def coverage_note(config: "OSFTSettings", counts: TokenCounts) -> str:
    """Return a line for explain() on what was not measured; empty if everything was."""
    empty = unmeasured(counts)
    effect = "are not trained" if config.unmeasured == "freeze" else "are trained without protection"
    return f"{_number(empty)} of {_number(counts)} matrices saw no token and {effect}" if empty else ""


def coverage_warning(counts: TokenCounts, chosen: Sequence[Matrix], statistics: Any) -> str:
    """Return a warning about a measurement that is too short; empty if it is not."""
    measured = sum(ring.tokens for ring in statistics.rings) if isinstance(statistics, Statistics) else 0
    return _too_few(counts, {matrix.weight: matrix.inputs for matrix in chosen}, measured)


def warnings_on(statistics: Statistics) -> list[str]:
    """Return the warnings about a complete measurement, before anything is protected with it."""
    entries = statistics.entries.items()
    counts = {w: e.tokens if isinstance(e.tokens, tuple) else (e.tokens,) for w, e in entries}
    texts = [_too_few(counts, {w: e.shape[-1] for w, e in entries}, sum(ring.tokens for ring in statistics.rings))]
    if empty := unmeasured(counts):
        texts.append(
            f"no token reached {_reached(empty, counts)}. osft refuses to train them, unless osft.unmeasured is freeze "
            "or unprotected: measure more text, or text that reaches them"
        )
    return [text for text in texts if text]


def _too_few(counts: TokenCounts, inputs: Mapping[str, int], measured: int) -> str:
    thin = {w: min(n for n in numbers if n) for w, numbers in counts.items() if any(n > 0 for n in numbers)}
    thin = {weight: n for weight, n in thin.items() if n < ENOUGH * inputs[weight]}
    if not thin:
        return ""
    worst = min(thin, key=lambda weight: thin[weight] / inputs[weight])
    total = max(measured, *(n for numbers in counts.values() for n in numbers))
    needed = ceil(total * ENOUGH * inputs[worst] / thin[worst])
    return (
        f"{len(thin)} of {len(counts)} weights were measured on fewer than {ENOUGH} tokens for each input dimension "
        f"(the fewest: {worst}, {thin[worst]:,} tokens for {inputs[worst]:,} inputs). Directions that so little text "
        f"did not use are trainable. About {needed:,} tokens would do, instead of {total:,} "
        f"(treering measure --tokens {needed})"
    )


def _reached(empty: TokenCounts, counts: TokenCounts) -> str:
    """Return "3 of 40 matrices (the first weight, its experts, how many more)"."""
    weight, numbers = next(iter(empty.items()))
    experts = f", experts {_listed(numbers)}" if len(counts[weight]) > 1 else ""
    more = f" and {len(empty) - 1} more weights" if len(empty) > 1 else ""
    return f"{_number(empty)} of {_number(counts)} matrices ({weight}{experts}{more})"


def _number(counts: Mapping[str, Sequence[int]]) -> str:
    return f"{sum(map(len, counts.values())):,}"


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
