"""Bytes and messages of the exchange, from shapes; and the arrangement of the ranks that costs least.

Forward and backward send, of rank r with s of S tokens, h of H query heads and n of K key heads, D and E wide:

    row      s Σ_{j≠r} (h_j D + n_j (D + E))    and back   (S_row − s) h E        forward, and as much in the backward
    column   (R − 1) S_row n (D + E)            and back   (S − S_row) n (D + E)

S_row: the tokens of a row of the grid. A collective that gathers pads each rank to the largest share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from treering.core.links import Links
from treering.technique import Collective, Message
from treering.techniques.ulysses.shares import Grid, head_shares

NOMINAL = 8192  # tokens of a rank for which an arrangement is chosen: a run decides before it sees a batch


@dataclass(frozen=True, kw_only=True)
class AttentionWidths:
    """The query and key heads of one attention, and the widths of key and value."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends: elements for other ranks, and calls, by axis of the grid and pass.

    Attributes:
        row: Tokens for heads and back.
        gathered: This rank's own keys and values, which it sends to each other rank of its column.
        summed: Gradients of the others' keys and values.
    """

    row_forward: int = 0
    row_backward: int = 0
    gathered: int = 0
    summed: int = 0
    forward_calls: int = 0
    backward_calls: int = 0
    gathers: int = 0
    sums: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def repeated(self, forwards: int, backwards: int) -> "Traffic":
        """Return the traffic of so many passes."""
        backward = ("row_backward", "summed", "backward_calls", "sums")
        times = {name: backwards if name in backward else forwards for name in vars(self)}
        return Traffic(**{name: value * times[name] for name, value in vars(self).items()})


def traffic(widths: AttentionWidths, grid: Grid, rank: int, tokens: int, *, padded: bool = True) -> Traffic:
    """Return what `rank` sends for one layer and a row of `tokens`.

    Args:
        padded: Gathered rows are padded to the largest share, as collectives do; in pairs they are not.
    """
    row, place = grid.place(rank)
    shares = head_shares(widths.heads, widths.kv_heads, grid.heads)
    of_row = [sum(map(len, ranges)) for ranges in grid.row_tokens(tokens)]
    own = sum(map(len, grid.tokens(tokens)[rank]))
    both = widths.head_dim + widths.value_dim
    wide = [len(q) * widths.head_dim + len(k) * both for q, k in zip(shares.query, shares.key)]
    found: dict[str, int] = {}
    if grid.heads > 1:
        heads = len(shares.query[place])
        away, others = own * (sum(wide) - wide[place]), of_row[row] - own
        found |= {
            "row_forward": away + others * heads * widths.value_dim,
            "row_backward": others * wide[place] + own * (widths.heads - heads) * widths.value_dim,
            "forward_calls": 2,
            "backward_calls": 2,
        }
    keys = len(shares.key[place])
    if grid.gathered > 1 and keys:
        found |= {
            "gathered": (max(of_row) if padded else of_row[row]) * keys * both,
            "summed": (sum(of_row) - of_row[row]) * keys * both,
            "gathers": 1,
            "sums": 1,
        }
    return Traffic(**found)


def messages(total: Traffic, grid: Grid, itemsize: int, micro_batches: int = 1) -> list[Message]:
    """Return the messages of a step whose every micro-batch sends `total`; `itemsize`: bytes of an element."""

    def message(kind: Collective, ranks: int, elements: int, calls: int, content: str) -> Message:
        size, often = elements * itemsize * micro_batches, calls * micro_batches
        return Message(kind=kind, axes=("sequence",), ranks=ranks, bytes=size, calls=often, content=content)

    row = total.row_forward + total.row_backward
    found = [
        message("all_to_all", grid.heads, row, total.forward_calls + total.backward_calls, "heads and tokens"),
        message("all_gather", grid.gathered, total.gathered, total.gathers, "keys and values"),
        message("all_to_all", grid.gathered, total.summed, total.sums, "gradients of keys and values"),
    ]
    return [one for one in found if one.calls]


def seconds(layers: Sequence[AttentionWidths], grid: Grid, tokens: int, links: Links, itemsize: int = 2) -> float:
    """Return how long the exchanges of a step take, and the ranks wait for those with most heads."""
    total = 0.0
    for widths in dict.fromkeys(layers):
        one = traffic(widths, grid, 0, tokens)
        row = (one.row_forward + one.row_backward) * itemsize
        column = (one.gathered * (grid.gathered - 1) + one.summed) * itemsize
        shares = head_shares(widths.heads, widths.kv_heads, grid.heads)
        # Causal attention, forward and backward: 7 products of half of tokens × tokens, beyond an even share of heads.
        waiting = len(shares.query[0]) / grid.gathered - widths.heads / grid.ranks
        work = 7 * waiting * tokens**2 * (widths.head_dim + widths.value_dim) / 2
        spent = links.seconds(row, grid.heads, calls=one.forward_calls + one.backward_calls)
        spent += links.seconds(column, grid.gathered, stride=grid.heads, calls=one.gathers + one.sums)
        total += list(layers).count(widths) * (spent + work / links.arithmetic)
    return total


def grids(ranks: int) -> list[Grid]:
    """Return every arrangement of `ranks`."""
    return [Grid(heads=heads, gathered=ranks // heads) for heads in range(1, ranks + 1) if ranks % heads == 0]


def choose(
    layers: Sequence[AttentionWidths], among: Sequence[Grid], links: Links | None = None, tokens: int | None = None
) -> Grid:
    """Return the arrangement with the shortest exchanges; of equal ones that with most heads exchanged."""
    length = tokens or NOMINAL * among[0].ranks
    return min(among, key=lambda grid: (seconds(layers, grid, length, links or Links()), -grid.heads))
