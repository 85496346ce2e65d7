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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treering.attention.documents import Attend
from treering.core.row_messages import Transport, all_gather_rows, all_to_all
from treering.techniques.ulysses.layout import pack, rows_of, unpack, views
from treering.techniques.ulysses.shares import HeadShares, Ranges, head_shares


@dataclass(frozen=True, kw_only=True, eq=False)
class Partners:
    """The ranks of a row or a column of the grid.

    Attributes:
        group: The name of their process group.
        place: Of this rank among them.
        tokens: How many each of them has: of a row, each rank's own; of a column, each row's.
        transport: How they exchange.
    """

    group: str
    place: int
    tokens: tuple[int, ...]
    transport: Transport = "collective"


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
            gathered_TBW = GatherRows.apply(rows_of((key, value)), self.column, self.ranges)
            key, value = views(gathered_TBW, [(key.shape[1], width) for width in widths[1:]])
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
        ctx.like = [(x.shape, x.dtype) for x in tensors]
        batch, tokens = query.shape[0], query.shape[2]
        sent, width = _sizes(tensors, of_heads, row.place, batch)
        received = [number * width for number in row.tokens]
        flat = pack(tensors, of_heads)
        arrived = all_to_all(row.transport)(flat, [tokens * size for size in sent], received, row.group)
        return arrived.view(sum(row.tokens), batch, width // batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TBW: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [_token_major(shape, gradient_TBW) for shape, _ in ctx.like]
        batch, tokens = gradients[0].shape[0], gradients[0].shape[2]
        received, width = _sizes(gradients, ctx.of_heads, ctx.row.place, batch)
        sent = [number * width for number in ctx.row.tokens]
        arrived = all_to_all(ctx.row.transport)(
            gradient_TBW.reshape(-1), sent, [tokens * size for size in received], ctx.row.group
        )
        unpack(arrived, gradients, ctx.of_heads)
        return *(x.to(dtype) for x, (_, dtype) in zip(gradients, ctx.like)), None, None


class _ToTokens(torch.autograd.Function):
    """From the output of all tokens, of this rank's heads, to that of its tokens, of all heads."""

    @staticmethod
    def forward(ctx: Any, out_BhTE: Tensor, heads: Ranges, row: Partners) -> Tensor:
        batch, here, _, width = out_BhTE.shape
        ctx.heads, ctx.row = heads, row
        tokens = row.tokens[row.place]
        each = batch * width
        received = [tokens * len(part) * each for part in heads]
        arrived = all_to_all(row.transport)(
            rows_of((out_BhTE,)).reshape(-1), [number * here * each for number in row.tokens], received, row.group
        )
        out = _token_major((batch, heads[-1].stop, tokens, width), out_BhTE)
        unpack(arrived, (out,), (heads,))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHtE: Tensor) -> tuple[Tensor | None, ...]:
        batch, _, tokens, width = gradient_BHtE.shape
        here, each = len(ctx.heads[ctx.row.place]), batch * width
        sent = [tokens * len(part) * each for part in ctx.heads]
        received = [number * here * each for number in ctx.row.tokens]
        flat = pack((gradient_BHtE,), (ctx.heads,))
        arrived = all_to_all(ctx.row.transport)(flat, sent, received, ctx.row.group)
        rows_TBW = arrived.view(sum(ctx.row.tokens), batch, here * width)
        return views(rows_TBW, [(here, width)])[0], None, None


class GatherRows(torch.autograd.Function):
    """From the rows [T, B, W] of this rank to those of all tokens in their order; gradients are summed in the order of
    the ranks and in at least float32, so that the sum has the same bits with every transport."""

    @staticmethod
    def forward(ctx: Any, rows_TBW: Tensor, column: Partners, ranges: tuple[Ranges, ...]) -> Tensor:
        ctx.column, ctx.ranges = column, ranges
        gathered = all_gather_rows(rows_TBW, list(column.tokens), column.group, column.transport)
        pieces = gathered.split([len(part) for of_rank in ranges for part in of_rank])
        order = sorted(zip((part.start for of_rank in ranges for part in of_rank), pieces), key=lambda one: one[0])
        return torch.cat([piece for _, piece in order])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TBW: Tensor) -> tuple[Tensor | None, ...]:
        column: Partners = ctx.column
        by_rank = torch.cat([gradient_TBW[part.start : part.stop] for of_rank in ctx.ranges for part in of_rank])
        here = column.tokens[column.place]
        ranks = len(column.tokens)
        arrived = all_to_all(column.transport)(by_rank, list(column.tokens), [here] * ranks, column.group)
        wide = torch.promote_types(gradient_TBW.dtype, torch.float32)
        total = arrived[:here].to(wide, copy=True)
        for part in arrived[here:].split(here):
            total += part
        return total.to(gradient_TBW.dtype), None, None


def _sizes(tensors: Sequence[Tensor], heads: Sequence[Ranges], place: int, batch: int) -> tuple[list[int], int]:
    """Return the elements of a token's row for each rank, and for this one."""
    sizes = [batch * sum(len(of[rank]) * x.shape[-1] for x, of in zip(tensors, heads)) for rank in range(len(heads[0]))]
    return sizes, sizes[place]


def _token_major(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an empty tensor [B, H, t, D] in the memory layout of transformers, tokens before heads."""
    batch, heads, tokens, width = shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)
