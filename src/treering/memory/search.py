"""A search for the smallest set of changes with which a run fits into memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclass(frozen=True, kw_only=True)
class Switch(Generic[State]):
    """A change of a run. `on` returns the run with it, or None where it is on already or needs another one first."""

    name: str
    config: str  # the lines of YAML to write
    on: Callable[[State], State | None]


def smallest(
    start: State, switches: Sequence[Switch[State]], fits: Callable[[State], bool]
) -> tuple[Switch[State], ...] | None:
    """Return the fewest of `switches` with which the run fits, earlier ones before later ones; None if all do not.

    Each is assumed to save memory: what does not fit with all but one of them needs that one.
    """
    known: dict[tuple[str, ...], bool] = {}

    def fits_with(chosen: Sequence[Switch[State]]) -> bool:
        state, used = _with(start, chosen)
        key = tuple(switch.name for switch in used)
        if len(used) < len(chosen) or not used:
            return False
        if key not in known:
            known[key] = fits(state)
        return known[key]

    _, useful = _with(start, switches)
    if not fits_with(useful):
        return None
    needed = [one for one in useful if not fits_with(_without(start, useful, one))]
    others = [one for one in useful if one not in needed]
    for count in range(len(others) + 1):
        for more in combinations(others, count):
            chosen = tuple(one for one in useful if one in needed or one in more)
            if fits_with(chosen):
                return chosen
    raise AssertionError("all of them fit")


def _with(start: State, switches: Sequence[Switch[State]]) -> tuple[State, list[Switch[State]]]:
    """Return the run with those of `switches` that change anything, and these."""
    state, used = start, list[Switch[State]]()
    for switch in switches:
        changed = switch.on(state)
        if changed is not None:
            state, used = changed, [*used, switch]
    return state, used


def _without(start: State, switches: Sequence[Switch[State]], one: Switch[State]) -> list[Switch[State]]:
    """Return the other switches, without those that need `one` first."""
    return _with(start, [switch for switch in switches if switch is not one])[1]
