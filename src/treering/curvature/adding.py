"""Measurements added up: a sum in which each counts as much as any other, however many tokens it was measured on.

A measurement (`Ring`) enters as its mean second moment. Weighted by tokens, a long first pretraining sample would hide
the task that was learned last; with weight 1 each, the protected set grows by what each task used.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from treering.core.errors import CheckpointError
from treering.curvature.disk import open_folder, writing
from treering.curvature.entry import Counts
from treering.curvature.statistics import Statistics


def add(given: Sequence[Statistics | str | Path], to: str | Path) -> Statistics:
    """Add up statistics of one model: A = Σ over all measurements of their means.

    Args:
        given: statistics, or folders of them.
        to: a folder to write; tensors are read and written one at a time.

    Returns:
        The statistics in that folder; their tokens are added as well.

    Example:
        both = add(["old", "new"], to="both")
    """
    if not given:
        raise CheckpointError("there is nothing to add: give at least one folder of statistics")
    each = [one if isinstance(one, Statistics) else open_folder(one) for one in given]
    first = each[0]
    for one in each[1:]:
        refuse_other(first, one)
    owners = joint(*({w: e.key for w, e in one.entries.items()} for one in each))
    shapes = {weight: first.entries[weight].shape for weight in dict.fromkeys(owners.values())}
    rings = [ring for one in each for ring in one.rings]
    with writing(Path(to), shapes, first.model_type, owners, rings) as writer:
        writer.fingerprints = each[-1].fingerprints
        for weight in shapes:
            writer.add(weight, partial(added, weight, each))
    return open_folder(to)


def added(
    weight: str, each: Iterable[Statistics], to: Tensor | None = None, tokens: Counts = 0
) -> tuple[Tensor, Counts]:
    """Return the sum of A of one weight over `each`, and of the tokens, on top of `to` and `tokens`."""
    total, count = to, tokens
    for one in each:
        value = one[weight]["inputs"]
        count = one.entries[weight].tokens if total is None else plus(count, one.entries[weight].tokens)
        total = value.clone() if total is None else total.add_(value)
    assert total is not None
    return total, count


def plus(a: Counts, b: Counts) -> Counts:
    """Return the sum of two counts, or of two counts for each expert."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(x + y for x, y in zip(a, b, strict=True))
    assert isinstance(a, int) and isinstance(b, int)
    return a + b


def joint(*keys: Mapping[str, str]) -> dict[str, str]:
    """Return, by weight, the weight whose tensor it shares: those that share one in each of the mappings."""
    groups: dict[tuple[str, ...], str] = {}
    return {weight: groups.setdefault(tuple(one[weight] for one in keys), weight) for weight in keys[0]}


def refuse_other(first: Statistics, other: Statistics) -> None:
    """Raise a CheckpointError where two statistics are not of one model."""
    if first.model_type != other.model_type:
        raise CheckpointError(
            f"{first.where} was measured on {first.model_type} and {other.where} on {other.model_type}; only "
            "statistics of one model can be added"
        )
    shapes = [{weight: entry.shape for weight, entry in one.entries.items()} for one in (first, other)]
    if shapes[0] != shapes[1]:
        names = [w for w in {**shapes[0], **shapes[1]} if shapes[0].get(w) != shapes[1].get(w)]
        raise CheckpointError(
            f"{first.where} and {other.where} differ in what they hold of {names[0]} ({shapes[0].get(names[0])} and "
            f"{shapes[1].get(names[0])}); only statistics of one model can be added"
        )
