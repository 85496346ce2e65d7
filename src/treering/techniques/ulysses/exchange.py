"""The messages around the attention of one layer: exact, differentiable, one each way and pass.

    heads      tokens of all heads → all tokens of some heads, and back             2 + 2 messages (forward + backward)
    gathered   keys and values of all tokens on every rank; gradients summed back   1 + 1
    2d         both, one inside the other                                           3 + 3

Sizes follow from the numbers of tokens and heads (`shares.py`): nothing is agreed on, and nothing of the length of the
sequence is gathered besides.

Shapes: B rows, H query heads, K key heads, t tokens of this rank, T tokens of what it attends with, D and E widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treering.attention.documents import Attend
from treering.core.row_messages import Transport
from treering.techniques.ulysses.coded import NONE, Codecs, Content, MessagePart, Rows, exchange, gather
from treering.techniques.ulysses.layout import pack, rows_of, unpack, views
from treering.techniques.ulysses.shares import HeadShares, Ranges, head_shares


@dataclass(frozen=True, kw_only=True, eq=False)
class Partners:
    """The ranks of a row or a column of the grid.

    Attributes:
        group: The name of their process group.
        place: Of this rank among them.
        tokens: How many each of them has: of a row, each rank's own; of a column, each row's.
        transport, codecs: How they exchange.
    """

    group: str
    place: int
    tokens: tuple[int, ...]
    transport: Transport = "collective"
    codecs: Codecs = NONE

    def exchange(self, flat: Tensor, sent: list[Rows], received: list[Rows], *, gradients: bool = False) -> Tensor:
        """Return what each partner sends to this rank, flat. A collective."""
        return exchange(flat, sent, received, self.group, self.transport, self.codecs, gradients=gradients)

    def gather(self, flat: Tensor, rows: list[Rows]) -> Tensor:
        """Return the rows of all partners, flat. A collective."""
        return gather(flat, rows, self.place, self.group, self.transport, self.codecs)


@dataclass(frozen=True, kw_only=True, eq=False)
class UlyssesExchange:
    """The exchange of one micro-batch, a `treering.attention.Exchange`.

    Attributes:
        row: The ranks that exchange tokens for heads; None: each rank keeps all heads.
        column: The ranks that gather each other's keys and values; None: a row has all tokens.
        ranges: Of the tokens of each rank of the column.
        last_position: The largest position of the complete batch.
    """

    row: Partners | None
    column: Partners | None = None
    ranges: tuple[Ranges, ...] = ()
    last_position: int = 0

    def around(
        self, attend: Attend, query_BHtD: Tensor, key_BKtD: Tensor, value_BKtE: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """Return the output, B × H × t × E."""
        of_query, of_key, of_value = dtypes = (query_BHtD.dtype, key_BKtD.dtype, value_BKtE.dtype)
        if len(set(dtypes)) > 1:  # they are one message
            wide = reduce(torch.promote_types, dtypes)

            def narrow(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
                return attend(q.to(of_query), k.to(of_key), v.to(of_value), s)

            return self.around(narrow, query_BHtD.to(wide), key_BKtD.to(wide), value_BKtE.to(wide), sinks_H)
        query, key, value, sinks = query_BHtD, key_BKtD, value_BKtE, sinks_H
        heads = query.shape[1]
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        shares, place = head_shares(heads, key.shape[1], 1), 0
        if self.row is not None:
            shares, place = head_shares(heads, key.shape[1], len(self.row.tokens)), self.row.place
            rows_TBW = _ToHeads.apply(query, key, value, shares, self.row)
            here = (len(shares.query[place]), len(shares.key[place]), len(shares.key[place]))
            query, key, value = views(rows_TBW, list(zip(here, widths)))
        if self.column is not None and key.shape[1]:
            parts = (MessagePart("key", key.shape[1], widths[1]), MessagePart("value", key.shape[1], widths[2]))
            gathered_TBW = GatherRows.apply(rows_of((key, value)), parts, self.column, self.ranges)
            key, value = views(gathered_TBW, [(part.heads, part.width) for part in parts])
        expansion = shares.expansion(place)
        if expansion is not None:
            key, value = (expanded(x, expansion) for x in (key, value))
        if sinks is not None and self.row is not None:
            sinks = sinks[shares.query[place].start : shares.query[place].stop]
        if query.shape[1]:
            out = attend(query, key, value, sinks)
        else:  # more ranks than heads: nothing to compute, and part of the graph all the same
            out = query[..., :1].expand(*query.shape[:-1], widths[-1])
            out = out if sinks is None else out + sinks.sum()
        if self.row is not None:
            out = _ToTokens.apply(out, shares.query, self.row)
        return out


def expanded(x_BKTD: Tensor, used: Sequence[int]) -> Tensor:
    """Return a key head for each query head."""
    heads = x_BKTD.unbind(1)
    return torch.stack([heads[i] for i in used], dim=1)


class _ToHeads(torch.autograd.Function):
    """From this rank's tokens of all heads to rows [T, B, W] of all tokens, of this rank's heads: q, k and v."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, shares: HeadShares, row: Partners) -> Tensor:
        tensors, of_heads = (query, key, value), (shares.query, shares.key, shares.key)
        ctx.of_heads, ctx.row = of_heads, row
        ctx.shapes = [x.shape for x in tensors]
        out, back = _rows_for_heads(ctx.shapes, of_heads, row)
        arrived = row.exchange(pack(tensors, of_heads), out, back)
        return arrived.view(sum(row.tokens), query.shape[0], back[0].width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TBW: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [_token_major(shape, gradient_TBW) for shape in ctx.shapes]
        back, out = _rows_for_heads(ctx.shapes, ctx.of_heads, ctx.row)
        unpack(ctx.row.exchange(gradient_TBW.reshape(-1), out, back, gradients=True), gradients, ctx.of_heads)
        return *gradients, None, None


class _ToTokens(torch.autograd.Function):
    """From the output of all tokens, of this rank's heads, to that of its tokens, of all heads."""

    @staticmethod
    def forward(ctx: Any, out_BhTE: Tensor, heads: Ranges, row: Partners) -> Tensor:
        batch, _, _, width = out_BhTE.shape
        ctx.heads, ctx.row = heads, row
        out, back = _rows_for_tokens(out_BhTE, heads, row)
        arrived = row.exchange(rows_of((out_BhTE,)).reshape(-1), out, back)
        complete = _token_major((batch, heads[-1].stop, row.tokens[row.place], width), out_BhTE)
        unpack(arrived, (complete,), (heads,))
        return complete

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHtE: Tensor) -> tuple[Tensor | None, ...]:
        heads, row = ctx.heads, ctx.row
        back, out = _rows_for_tokens(gradient_BHtE, heads, row)
        arrived = row.exchange(pack((gradient_BHtE,), (heads,)), out, back, gradients=True)
        rows_TBW = arrived.view(sum(row.tokens), gradient_BHtE.shape[0], back[0].width)
        return views(rows_TBW, [(len(heads[row.place]), gradient_BHtE.shape[-1])])[0], None, None


class GatherRows(torch.autograd.Function):
    """From the rows [T, B, W] of this rank to those of all tokens in their order; gradients are summed in the order of
    the ranks and in at least float32, so that the sum has the same bits with every transport."""

    @staticmethod
    def forward(
        ctx: Any, rows_TBW: Tensor, parts: tuple[MessagePart, ...], column: Partners, ranges: tuple[Ranges, ...]
    ) -> Tensor:
        ctx.parts, ctx.column, ctx.ranges = parts, column, ranges
        batch, width = rows_TBW.shape[1:]
        gathered = column.gather(rows_TBW.reshape(-1), [Rows(tokens * batch, parts) for tokens in column.tokens])
        pieces = gathered.view(sum(column.tokens), batch, width).split([len(x) for of_rank in ranges for x in of_rank])
        order = sorted(zip((part.start for of_rank in ranges for part in of_rank), pieces), key=lambda one: one[0])
        return torch.cat([piece for _, piece in order])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TBW: Tensor) -> tuple[Tensor | None, ...]:
        column: Partners = ctx.column
        batch, width = gradient_TBW.shape[1:]
        by_rank = torch.cat([gradient_TBW[part.start : part.stop] for of_rank in ctx.ranges for part in of_rank])
        here = column.tokens[column.place]
        sent = [Rows(tokens * batch, ctx.parts) for tokens in column.tokens]
        received = [Rows(here * batch, ctx.parts)] * len(column.tokens)
        arrived = column.exchange(by_rank.reshape(-1), sent, received, gradients=True)
        arrived = arrived.view(len(received), here, batch, width)
        total = arrived[0].to(torch.promote_types(arrived.dtype, torch.float32), copy=True)
        for part in arrived[1:]:
            total += part
        return total.to(gradient_TBW.dtype), None, None, None


def _rows_for_heads(
    shapes: Sequence[Sequence[int]], heads: Sequence[Ranges], row: Partners
) -> tuple[list[Rows], list[Rows]]:
    """Return the messages that this rank sends to each of the row for q, k and v, and those that it receives."""
    contents: tuple[Content, ...] = ("query", "key", "value")
    widths = [shape[-1] for shape in shapes]
    parts = [
        tuple(MessagePart(content, len(of[rank]), width) for content, of, width in zip(contents, heads, widths))
        for rank in range(len(row.tokens))
    ]
    batch, tokens = shapes[0][0], row.tokens[row.place]
    return [Rows(tokens * batch, one) for one in parts], [Rows(n * batch, parts[row.place]) for n in row.tokens]


def _rows_for_tokens(out: Tensor, heads: Ranges, row: Partners) -> tuple[list[Rows], list[Rows]]:
    """Return the messages that this rank sends to each of the row for the output, and those that it receives."""
    batch, width = out.shape[0], out.shape[-1]
    sent = [Rows(tokens * batch, (MessagePart("output", len(heads[row.place]), width),)) for tokens in row.tokens]
    tokens = row.tokens[row.place]
    return sent, [Rows(tokens * batch, (MessagePart("output", len(part), width),)) for part in heads]


def _token_major(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an empty tensor [B, H, t, D] in the memory layout of transformers, tokens before heads."""
    batch, heads, tokens, width = shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)
