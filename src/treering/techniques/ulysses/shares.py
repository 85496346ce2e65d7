"""Which tokens and which heads each rank of the axis `sequence` has, known on every rank without communication.

The P ranks are a grid of R × U: rank = r U + u. Ranks of one r exchange tokens for heads among themselves (Ulysses);
ranks of one u gather each other's keys and values.

    U = P, R = 1   heads      each rank computes the attention of all tokens for some of the heads
    U = 1, R = P   gathered   each rank computes the attention of its own queries for all heads, over all keys
    else           2d         both: all heads of a row of the grid, for that row's queries

With R > 1, row r of the grid has the chunks r and 2R − 1 − r of 2R chunks of the tokens: an early one with few keys to
see and a late one with many, so that causal attention costs all ranks the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Literal

Ranges = tuple[range, ...]


def even(number: int, parts: int) -> Ranges:
    """Return `number` things in consecutive parts, the first parts one longer where they cannot be equal."""
    least, more = divmod(number, parts)
    stops = list(accumulate(least + (part < more) for part in range(parts)))
    return tuple(range(start, stop) for start, stop in zip([0, *stops], stops))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The ranks of the axis `sequence`: `gathered` rows of `heads` ranks each."""

    heads: int
    gathered: int = 1

    @property
    def ranks(self) -> int:
        return self.heads * self.gathered

    @property
    def layout(self) -> Literal["heads", "gathered", "2d"]:
        """The kind of arrangement, as the settings name it."""
        if self.gathered == 1:
            return "heads"
        return "gathered" if self.heads == 1 else "2d"

    def place(self, rank: int) -> tuple[int, int]:
        """Return (row of the grid, place in the row) of a rank."""
        return divmod(rank, self.heads)

    def padded(self, tokens: int) -> int:
        """Return how many tokens a row has with padding: no rank is without one, because no layer can do with none."""
        return max(tokens, self.ranks)

    def tokens(self, tokens: int) -> tuple[Ranges, ...]:
        """Return the ranges of a row's tokens that each rank has, one or two that are not empty."""
        return _tokens(self, tokens)

    def row_tokens(self, tokens: int) -> tuple[Ranges, ...]:
        """Return the ranges of a row's tokens that each row of the grid has."""
        return _row_tokens(self, tokens)


@lru_cache(256)  # every batch may have another length
def _row_tokens(grid: Grid, tokens: int) -> tuple[Ranges, ...]:
    if grid.gathered == 1:
        return ((range(grid.padded(tokens)),),)
    chunks = even(grid.padded(tokens), 2 * grid.gathered)
    pairs = ((chunks[row], chunks[-1 - row]) for row in range(grid.gathered))
    return tuple(_joined(pair) for pair in pairs)


@lru_cache(256)
def _tokens(grid: Grid, tokens: int) -> tuple[Ranges, ...]:
    shares: list[Ranges] = []
    for ranges in _row_tokens(grid, tokens):
        shares += [_within(ranges, part) for part in even(sum(map(len, ranges)), grid.heads)]
    return tuple(shares)


def _joined(ranges: Sequence[range]) -> Ranges:
    """Return ranges without empty ones, and with those that follow each other as one."""
    joined: list[range] = []
    for one in ranges:
        if len(one) and joined and joined[-1].stop == one.start:
            joined[-1] = range(joined[-1].start, one.stop)
        elif len(one):
            joined.append(one)
    return tuple(joined)


def _within(ranges: Sequence[range], part: range) -> Ranges:
    """Return the ranges of the tokens numbered by `part` when those of `ranges` are counted one after the other."""
    found, start = [], 0
    for one in ranges:
        found.append(one[max(part.start - start, 0) : max(part.stop - start, 0)])
        start += len(one)
    return _joined(found)


def pieces(lengths: Sequence[int], ranges: Sequence[range]) -> tuple[int, ...]:
    """Return the lengths of what ranges of a row hold of each of its documents."""
    stops = list(accumulate(lengths))
    return tuple(
        len(shared)
        for part in ranges
        for length, stop in zip(lengths, stops)
        if len(shared := range(max(part.start, stop - length), min(part.stop, stop)))
    )


@dataclass(frozen=True, kw_only=True)
class HeadShares:
    """The heads of each rank of a row of the grid. A key head is sent to every rank that has a query head of it.

    Attributes:
        query, key: Ranges of query heads, and of the key heads that they share.
        shared: Query heads of one key head.
    """

    query: Ranges
    key: Ranges
    shared: int

    def expansion(self, place: int) -> tuple[int, ...] | None:
        """Return for each query head of a rank which of its key heads it uses; None where it is the usual order, of
        equally many query heads for each key head."""
        query, key = self.query[place], self.key[place]
        used = tuple(head // self.shared - key.start for head in query)
        return None if len(key) == 0 or used == _usual(len(query), len(key)) else used


def _usual(query: int, key: int) -> tuple[int, ...] | None:
    return None if query % key else tuple(head // (query // key) for head in range(query))


@cache
def head_shares(query: int, key: int, ranks: int) -> HeadShares:
    """Return how `query` heads that share `key` heads are divided over `ranks`; some have none if there are too few.

    Example:
        >>> head_shares(6, 2, 4).key
        (range(0, 1), range(0, 2), range(1, 2), range(1, 2))
    """
    shared = query // key
    of_query = even(query, ranks)
    of_key = (range(part.start // shared, -(-part.stop // shared)) if len(part) else range(0) for part in of_query)
    return HeadShares(query=of_query, key=tuple(of_key), shared=shared)
