"""Bytes and messages of the exchange, from shapes; and the arrangement of the ranks that costs least.

Forward and backward send, of rank r with s of S tokens, h of H query heads and n of K key heads, D and E wide:

    row      s Σ_{j≠r} (h_j D + n_j (D + E))    and back   (S_row − s) h E        forward, and as much in the backward
    column   (R − 1) S_row n (D + E)            and back   (S − S_row) n (D + E)

elements, or their codes. S_row: the tokens of a row of the grid. A collective that gathers pads each rank to the
largest share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from treering.core.links import Links
from treering.technique import Collective, Message
from treering.techniques.ulysses.coded import Codecs, MessagePart, Rows
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
class SentForm:
    """In which form tensors are sent.

    Attributes:
        itemsize: Bytes of an element of the model.
        codec, uncoded: As in the settings.
        padded: Gathered rows are padded to the largest share, as collectives do; in pairs they are not.
    """

    itemsize: int = 2
    codec: str = "none"
    uncoded: tuple[str, ...] = ()
    padded: bool = True

    @cached_property
    def codecs(self) -> Codecs:
        return Codecs.of(self.codec, self.uncoded)

    @cache  # noqa: B019 (there are few forms)
    def size(self, rows: Rows, *, gradients: bool = False) -> int:
        """Return the bytes of a message."""
        return self.codecs.size(rows, self.itemsize, gradients=gradients)


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends to others, and in how many calls."""

    size: int = 0
    calls: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.size + other.size, self.calls + other.calls)

    def __mul__(self, times: int) -> "Sent":
        return Sent(self.size * times, self.calls * times)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends, by what it is. The last three are sent in the backward.

    Attributes:
        to_heads: Queries, keys and values of its tokens, for other ranks' heads.
        to_tokens: The output of its heads, for other ranks' tokens.
        gathered: Its keys and values, counted once, though each rank of its column gets them.
        from_heads, from_tokens: Gradients of the first two.
        summed: Gradients of the others' keys and values.
    """

    to_heads: Sent = Sent()
    to_tokens: Sent = Sent()
    gathered: Sent = Sent()
    from_heads: Sent = Sent()
    from_tokens: Sent = Sent()
    summed: Sent = Sent()

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def repeated(self, *, forwards: int = 1, inputs: int = 1, keys: int = 1, outputs: int = 1) -> "Traffic":
        """Return the traffic of so many passes: forward, and backward to queries, keys and values, to keys and values
        that were gathered, and from the output."""
        return Traffic(
            to_heads=self.to_heads * forwards,
            to_tokens=self.to_tokens * forwards,
            gathered=self.gathered * forwards,
            from_heads=self.from_heads * inputs,
            from_tokens=self.from_tokens * outputs,
            summed=self.summed * keys,
        )


@cache
def traffic(widths: AttentionWidths, grid: Grid, rank: int, tokens: int, form: SentForm) -> Traffic:
    """Return what `rank` sends for one layer and a row of `tokens`, forward and backward."""
    row, place = grid.place(rank)
    shares = head_shares(widths.heads, widths.kv_heads, grid.heads)
    of_ranks = [sum(map(len, ranges)) for ranges in grid.tokens(tokens)[row * grid.heads : (row + 1) * grid.heads]]
    of_rows = [sum(map(len, ranges)) for ranges in grid.row_tokens(tokens)]
    own, others = of_ranks[place], [i for i in range(grid.heads) if i != place]
    found: dict[str, Sent] = {}
    if grid.heads > 1:
        inputs = [_parts(widths, len(q), len(k)) for q, k in zip(shares.query, shares.key)]
        outputs = [(MessagePart("output", len(q), widths.value_dim),) for q in shares.query]
        to_heads = sum(form.size(Rows(own, inputs[i])) for i in others)
        to_tokens = sum(form.size(Rows(of_ranks[i], outputs[place])) for i in others)
        from_heads = sum(form.size(Rows(of_ranks[i], inputs[place]), gradients=True) for i in others)
        from_tokens = sum(form.size(Rows(own, outputs[i]), gradients=True) for i in others)
        found |= {
            "to_heads": Sent(to_heads, 1),
            "to_tokens": Sent(to_tokens, 1),
            "from_heads": Sent(from_heads, 1),
            "from_tokens": Sent(from_tokens, 1),
        }
    keys = len(shares.key[place])
    if grid.gathered > 1 and keys:
        parts = _parts(widths, 0, keys)[1:]
        sizes = [form.size(Rows(number, parts)) for number in of_rows]
        back = sum(form.size(Rows(number, parts), gradients=True) for i, number in enumerate(of_rows) if i != row)
        found |= {"gathered": Sent(max(sizes) if form.padded else sizes[row], 1), "summed": Sent(back, 1)}
    return Traffic(**found)


def _parts(widths: AttentionWidths, heads: int, keys: int) -> tuple[MessagePart, ...]:
    """Return the parts of a row of q, k and v of so many heads."""
    return (
        MessagePart("query", heads, widths.head_dim),
        MessagePart("key", keys, widths.head_dim),
        MessagePart("value", keys, widths.value_dim),
    )


def messages(total: Traffic, grid: Grid, micro_batches: int = 1) -> list[Message]:
    """Return the messages of a step whose every micro-batch sends `total`."""

    def message(kind: Collective, ranks: int, stride: int, sent: Sent, content: str) -> Message:
        each = sent * micro_batches
        return Message(
            kind=kind,
            axes=("sequence",),
            ranks=ranks,
            bytes=each.size,
            calls=each.calls,
            content=content,
            stride=stride,
        )

    row = total.to_heads + total.to_tokens + total.from_heads + total.from_tokens
    found = [
        message("all_to_all", grid.heads, 1, row, "heads and tokens"),
        message("all_gather", grid.gathered, grid.heads, total.gathered, "keys and values"),
        message("all_to_all", grid.gathered, grid.heads, total.summed, "gradients of keys and values"),
    ]
    return [one for one in found if one.calls]


FORM = SentForm()


def seconds(layers: Sequence[AttentionWidths], grid: Grid, tokens: int, links: Links, form: SentForm = FORM) -> float:
    """Return how long the exchanges of a step take, and the ranks wait for those with most heads."""
    total = 0.0
    for widths in dict.fromkeys(layers):
        one = traffic(widths, grid, 0, tokens, form)
        row = one.to_heads + one.to_tokens + one.from_heads + one.from_tokens
        # Causal attention, forward and backward: 7 products of half of tokens × tokens, beyond an even share of heads.
        waiting = (busiest(widths, grid) - 1 / grid.ranks) * widths.heads
        work = 7 * waiting * tokens**2 * (widths.head_dim + widths.value_dim) / 2
        spent = links.seconds(row.size, grid.heads, calls=row.calls)
        own = one.gathered * (grid.gathered - 1)
        spent += links.seconds(own.size, grid.gathered, grid.heads, one.gathered.calls, ring=True)
        spent += links.seconds(one.summed.size, grid.gathered, grid.heads, one.summed.calls)
        total += list(layers).count(widths) * (spent + work / links.arithmetic)
    return total


def busiest(widths: AttentionWidths, grid: Grid) -> float:
    """Return which part of an attention the rank computes that has most heads."""
    return len(head_shares(widths.heads, widths.kv_heads, grid.heads).query[0]) / widths.heads / grid.gathered


def compared(
    layers: Sequence[AttentionWidths], chosen: Grid, tokens: int, links: Links, form: SentForm = FORM
) -> list[str]:
    """Return lines, one for `chosen` and for the fastest arrangement of each other kind, the fastest first: what rank 0
    sends for the first layer of a row of `tokens`, forward and backward, and how long it takes."""
    spent = {grid: seconds(layers[:1], grid, tokens, links, form) for grid in grids(chosen.ranks)}
    best = {grid.layout: grid for grid in sorted(spent, key=lambda grid: -spent[grid])} | {chosen.layout: chosen}
    lines = ["a layer of these tokens sends, forward and backward"]
    for grid in sorted(best.values(), key=lambda grid: spent[grid]):
        one = traffic(layers[0], grid, 0, tokens, form)
        parts = (one.to_heads, one.to_tokens, one.from_heads, one.from_tokens, one.summed)
        total = sum(parts, Sent(one.gathered.size * (grid.gathered - 1), one.gathered.calls))
        shape = f"2d ({grid.gathered} × {grid.heads})" if grid.layout == "2d" else grid.layout
        size, more = total.size / 2**20, busiest(layers[0], grid) * grid.ranks - 1
        uneven = f", {more:.0%} more attention on one rank" if more > 0.005 else ""
        mark = " (chosen)" if grid == chosen else ""
        lines.append(f"  {shape}: {size:,.1f} MiB in {total.calls} calls, {1000 * spent[grid]:,.2f} ms{uneven}{mark}")
    return lines


def grids(ranks: int) -> list[Grid]:
    """Return every arrangement of `ranks`."""
    return [Grid(heads=heads, gathered=ranks // heads) for heads in range(1, ranks + 1) if ranks % heads == 0]


def choose(
    layers: Sequence[AttentionWidths],
    among: Sequence[Grid],
    links: Links | None = None,
    tokens: int | None = None,
    form: SentForm = FORM,
) -> Grid:
    """Return the arrangement with the shortest exchanges; of equal ones that with most heads exchanged."""
    length = tokens or NOMINAL * among[0].ranks
    return min(among, key=lambda grid: (seconds(layers, grid, length, links or Links(), form), -grid.heads))
