"""How much text was measured for each target: what nothing is known about is refused, what little is known is said.

A direction that no token used is trainable. That is the point of measuring, as long as there were tokens: of a matrix
that saw none, or fewer than it has inputs, most directions are unused because nobody looked.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.curvature import Statistics
from treering.techniques.osft.targets import Target

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings

ENOUGH = 4  # tokens for each input dimension; with fewer the small eigenvalues of A are mostly chance

Counts = dict[str, tuple[int, ...]]  # weight -> tokens of its matrix, or of each of its experts


def counted(chosen: Sequence[Target], statistics: Any) -> Counts:
    """Tokens that each target's matrices saw. Targets that the statistics do not have are left out."""
    found: Counts = {}
    for target in chosen:
        if isinstance(statistics, Statistics):  # without reading a tensor
            tokens = statistics.entries[target.weight].tokens if target.weight in statistics else None
            numbers = None if tokens is None else torch.tensor(tokens)
        else:
            numbers = tokens_of(statistics.get(target.weight))
        if numbers is not None:
            found[target.weight] = tuple(numbers.reshape(-1).expand(target.experts or 1).tolist())
    return found


def tokens_of(statistics: Mapping[str, Tensor] | None) -> Tensor | None:
    """Of one weight. A matrix whose moment is zero saw none, whatever the mapping says, or does not say."""
    if statistics is None or "inputs" not in statistics:
        return None
    seen = statistics["inputs"].diagonal(dim1=-2, dim2=-1).sum(-1) != 0
    return torch.where(seen, statistics.get("tokens", torch.tensor(-1)).to(torch.int64), 0)


def refuse_unmeasured(config: "OSFTSettings", chosen: Sequence[Target], statistics: Any) -> None:
    counts = counted(chosen, statistics)
    if counts and not any(n for numbers in counts.values() for n in numbers):
        raise PlanError(
            "osft: the statistics were measured on no token at all (was it padding alone?), so nothing would be "
            "protected. Measure text that stands for what must be kept: treering measure MODEL --data FILE --to DIR",
            settings=("statistics.path",),
        )
    empty = unmeasured(counts)
    if not empty or config.unmeasured != "refuse" or config.protect == "weights":
        return
    weight, numbers = next(iter(empty.items()))
    experts = f", experts {_listed(numbers)}" if len(counts[weight]) > 1 else ""
    more = f" and {len(empty) - 1} more weights" if len(empty) > 1 else ""
    raise PlanError(
        f"osft: no token of the measured text reached {matrices(empty)} of {matrices(counts)} matrices ({weight}"
        f"{experts}{more}), so nothing about them is known that could be protected. Measure more text, or text that "
        "reaches them (treering measure --tokens N), or set osft.unmeasured: freeze (these do not learn) or "
        "unprotected (these learn freely)",
        settings=("statistics.path", "techniques.osft.unmeasured"),
    )


def unmeasured(counts: Counts) -> Counts:
    """Weight -> which of its matrices saw no token; weights without such are left out."""
    found = {weight: tuple(i for i, n in enumerate(numbers) if n == 0) for weight, numbers in counts.items()}
    return {weight: numbers for weight, numbers in found.items() if numbers}


def frozen(config: "OSFTSettings", statistics: Mapping[str, Tensor] | None) -> Tensor | None:
    """Which matrices of one weight do not learn, since nothing about them is known; None: all learn."""
    tokens = tokens_of(statistics) if config.unmeasured == "freeze" and config.protect != "weights" else None
    return None if tokens is None or bool((tokens != 0).all()) else (tokens == 0).reshape(-1)


def note(config: "OSFTSettings", counts: Counts) -> str:
    """A line for explain() on what was not measured; empty if all was."""
    empty = unmeasured(counts)
    does = "do not learn" if config.unmeasured == "freeze" else "learn unprotected"
    return f"{matrices(empty)} of {matrices(counts)} matrices saw no token and {does}" if empty else ""


def warning(counts: Counts, chosen: Sequence[Target], statistics: Any) -> str:
    """What a person should know of a measurement that is too short; empty if it is not."""
    measured = sum(r.tokens for r in statistics.rings) if isinstance(statistics, Statistics) else 0
    return too_few(counts, {target.weight: target.inputs for target in chosen}, measured)


def warnings_on(statistics: Statistics) -> list[str]:
    """The same of a whole measurement, before anybody protects anything with it."""
    entries = statistics.entries.items()
    counts = {w: e.tokens if isinstance(e.tokens, tuple) else (e.tokens,) for w, e in entries}
    found = [too_few(counts, {w: e.shape[-1] for w, e in entries}, sum(r.tokens for r in statistics.rings))]
    if empty := unmeasured(counts):
        weight, numbers = next(iter(empty.items()))
        experts = f", experts {_listed(numbers)}" if len(counts[weight]) > 1 else ""
        more = f" and {len(empty) - 1} more weights" if len(empty) > 1 else ""
        found.append(
            f"no token reached {matrices(empty)} of {matrices(counts)} matrices ({weight}{experts}{more}). osft "
            "refuses to train them, unless osft.unmeasured is freeze or unprotected: measure more text, or text that "
            "reaches them"
        )
    return [text for text in found if text]


def too_few(counts: Counts, inputs: Mapping[str, int], measured: int) -> str:
    thin = {w: min(n for n in numbers if n) for w, numbers in counts.items() if any(n > 0 for n in numbers)}
    thin = {weight: n for weight, n in thin.items() if n < ENOUGH * inputs[weight]}
    if not thin:
        return ""
    worst = min(thin, key=lambda weight: thin[weight] / inputs[weight])
    whole = max(measured, *(n for numbers in counts.values() for n in numbers))
    needed = ceil(whole * ENOUGH * inputs[worst] / thin[worst])
    return (
        f"{len(thin)} of {len(counts)} weights were measured on fewer than {ENOUGH} tokens for each input dimension "
        f"(the fewest: {worst}, {thin[worst]:,} tokens for {inputs[worst]:,} inputs). Directions that so little text "
        f"did not use are trainable. About {needed:,} tokens would do, instead of {whole:,} "
        f"(treering measure --tokens {needed})"
    )


def matrices(counts: Mapping[str, Sequence[int]]) -> str:
    return f"{sum(map(len, counts.values())):,}"


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
