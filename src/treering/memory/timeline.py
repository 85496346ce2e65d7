"""The bytes in memory at the worst moment of each part of a step, by category and for any length.

A storage either grows with the number of tokens or does not, and which it is can be read from its size: a step is
traced with a prime number of tokens S, of which (S − 1) / 2 is prime as well, since a loss sees S − 1 tokens. Numbers
of elements that such numbers divide are of tokens; widths, ranks, tiles are products of small numbers. So one trace
of the events of a step gives every moment of a step of any length.

Where ranks share a row, it is so many times S that each rank's share, and each range of it, is a multiple of S.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from treering.memory.tracker import CATEGORIES, Category

if TYPE_CHECKING:
    from treering.memory.tracker import StorageRecord, Tracker

Phase = Literal["forward", "loss", "backward", "step"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward", "step")
SHORT, LONG = 8147, 16223  # tokens of a trace: the second where a tile has all of the first
_INDEX = {category: i for i, category in enumerate(CATEGORIES)}


@dataclass(frozen=True, kw_only=True)
class TracedRow:
    """The tokens of the row with which a step is traced: `multiple` × `unit`."""

    unit: int
    multiple: int = 1

    @property
    def tokens(self) -> int:
        return self.unit * self.multiple

    @property
    def distinguishes(self) -> bool:
        """Whether what grows with the tokens can be recognised by its size."""
        return self.unit == traced_length(self.unit)


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """Bytes on the device after each event, moment × category × power of the length, and bytes in host memory.

    Segments are numbered as in `trace`. Lengths are counted in parts of a row, `row.multiple` of them.
    """

    blocks: int
    row: TracedRow
    device: np.ndarray
    segments: np.ndarray
    host: np.ndarray
    kept: np.ndarray  # segment × power of the length: bytes kept from there for the backward
    complete_tile: bool = False  # a tile had all tokens of the row

    def peaks(self, length: int) -> np.ndarray:
        """Return bytes, segment × category, at the worst moment of each segment."""
        moments_categories = self.device @ self._powers(length)
        total = moments_categories.sum(1)
        worst = np.zeros((2 * self.blocks + 4, len(CATEGORIES)))
        for segment in range(len(worst)):
            moments = np.flatnonzero(self.segments == segment)
            if len(moments):
                worst[segment] = moments_categories[moments[total[moments].argmax()]]
        return worst

    def kept_of(self, blocks: range, length: int) -> float:
        """Return the bytes that these blocks keep from their forward for the backward."""
        return float((self.kept[blocks.start + 1 : blocks.stop + 1] @ self._powers(length)).sum())

    def peak(self, length: int) -> float:
        """Return the most bytes on the device at one moment."""
        return float(self.peaks(length).sum(1).max())

    def host_peak(self, length: int) -> float:
        """Return the most bytes in host memory at one moment."""
        return float((self.host @ self._powers(length)).max())

    def _powers(self, length: int) -> np.ndarray:
        part = -(-length // self.row.multiple)  # that of the rank that has most
        return np.array([1.0, part, float(part) ** 2])


def phase_of(segment: int, blocks: int) -> Phase:
    """Return the phase that a segment of a step of `blocks` blocks belongs to."""
    if segment <= blocks:
        return "forward"
    if segment == blocks + 1:
        return "loss"
    return "backward" if segment <= 2 * blocks + 2 else "step"


def traced_length(wanted: int, most: int = LONG) -> int:
    """Return the largest number of tokens up to `wanted` (and `most`) that distinguishes tokens from widths."""
    length = min(wanted, most)
    while length > 11 and not (_prime(length) and _prime((length - 1) // 2)):
        length -= 1
    return max(length, 11)


def traced_row(wanted: int, ranges: Callable[[int], Sequence[range]], most: int = LONG) -> TracedRow:
    """Return the row with which to trace a step of `wanted` tokens, or fewer if the share of a rank is longer than
    `most`.

    Args:
        ranges: From the number of a row's tokens to the ranges of them that this rank computes.
    """
    probe = LONG * LONG
    shares = round(probe / sum(map(len, ranges(probe))))
    if shares == 1:
        return TracedRow(unit=traced_length(wanted, most))
    for multiple in (2 * shares * factor for factor in range(1, 17)):  # a share may be two ranges
        unit = traced_length(min(wanted // multiple, most * shares // multiple))
        if all(bound % unit == 0 for part in ranges(unit * multiple) for bound in (part.start, part.stop)):
            return TracedRow(unit=unit, multiple=multiple)
    raise AssertionError("no row has a share of which each range is a multiple of the same prime number")


def _prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def read(tracker: "Tracker", blocks: int, row: TracedRow) -> Timeline:
    """Return what `tracker` has recorded of a step with `row`. One that does not distinguish what grows gives a
    timeline of that length only."""
    events = list(tracker.events)  # what is freed from here on adds more
    distinguishes = row.distinguishes
    changes = np.zeros((len(events), len(CATEGORIES), 3))
    host, kept = np.zeros((len(events), 3)), np.zeros((2 * blocks + 4, 3))
    for i, (by, record, _) in enumerate(events):
        power, divisor = _power(record, row) if distinguishes else (0, 1.0)
        if record.host:
            host[i, power] = by / divisor
        else:
            category = _category(record, blocks)
            changes[i, _INDEX[category], power] = by / divisor
            if category == "activations" and by > 0:
                kept[record.born, power] += by / divisor
    begins = max(tracker.begins - 1, 0)  # the moment at which the step begins
    segments = np.array([segment for _, _, segment in events])
    segments[: tracker.begins] = 0
    return Timeline(
        blocks=blocks,
        row=row,
        device=changes.cumsum(0)[begins:],
        segments=segments[begins:],
        host=host.cumsum(0)[begins:],
        kept=kept,
        complete_tile=tracker.complete_tile,
    )


def _power(record: "StorageRecord", row: TracedRow) -> tuple[int, float]:
    """Return the power of the length that a storage grows with, and that power of the unit of the traced row."""
    if record.category in ("parameters", "technique", "optimizer", "gradients"):
        return 0, 1.0
    if record.host:  # pieces of one size, more of them for more tokens
        return 1, float(row.unit)
    for divisor in (row.unit, row.unit - 1) if row.multiple == 1 else (row.unit,):
        if record.elements and record.elements % divisor == 0:
            square = record.elements % divisor**2 == 0
            return (2, float(divisor) ** 2) if square else (1, float(divisor))
    return (1, float(row.unit)) if record.rows else (0, 1.0)


def _category(record: "StorageRecord", blocks: int) -> Category:
    """Return `activations` for what is kept from the forward for the backward, `workspace` for what is freed before."""
    if record.category is not None:
        return record.category
    if record.born == blocks + 1:
        return "loss"
    if record.born <= blocks and (record.died is None or record.died > blocks + 1):
        return "activations"
    return "workspace"


def worst_of_phases(peaks: np.ndarray, phases: Sequence[Phase]) -> dict[Phase, np.ndarray]:
    """Return the categories of the worst segment of each phase."""
    worst: dict[Phase, np.ndarray] = {}
    for phase, peak in zip(phases, peaks):
        if phase not in worst or peak.sum() > worst[phase].sum():
            worst[phase] = peak
    return worst
