"""One attention over ranks that have a part of the tokens each, for any model, with gradients or without.

Shapes: B rows, H query heads, K key heads, t tokens of this rank, R tokens that every rank has, D and E widths.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from treering.core.errors import DataError
from treering.core.row_messages import Transport, gather_equal
from treering.techniques.ulysses.coded import Codecs, MessagePart
from treering.techniques.ulysses.exchange import GatherRows, Partners, UlyssesExchange, expanded
from treering.techniques.ulysses.settings import Codec, Uncoded
from treering.techniques.ulysses.shares import head_shares

AttendPlainly = Callable[[Tensor, Tensor, Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def sequence_attention(
    query_BHtD: Tensor,
    key_BKtD: Tensor,
    value_BKtE: Tensor,
    group: Any = None,
    *,
    causal: bool = False,
    scaling: float | None = None,
    attend: AttendPlainly | None = None,
    lengths: Sequence[int] | None = None,
    replicated: Three | None = None,
    replicated_at: Literal["start", "end"] = "end",
    transport: Transport = "collective",
    codec: Codec = "none",
    uncoded: Collection[Uncoded] = (),
) -> Any:
    """Return this rank's part of the attention of all tokens, [B, H, t, E]. A collective, and one more in the backward.

    Ranks exchange tokens for heads, so each computes all tokens for some of the heads. Any numbers of tokens and heads
    go, also ranks without a token and more ranks than heads.

    With `replicated`, tokens that every rank has (a text next to an image) attend and are attended to as well, and a
    pair is returned: [B, H, t, E] and, equal on every rank, [B, H, R, E]. Gradients are those of the sum of all ranks'
    losses: gradients of `replicated`, like those of parameters, are this rank's part of a sum over the ranks.

    Args:
        query_BHtD, key_BKtD, value_BKtE: of this rank's tokens, in the order of the ranks; H is a multiple of K.
        group: process group; None: all ranks.
        causal: a token sees itself and those before it.
        scaling: of q·k; None: 1/√D.
        attend: (q, k, v) of all tokens → output, in place of torch's scaled_dot_product_attention; it is then what
            `causal` and `scaling` would say. It may get fewer query heads than H, and as many or fewer key heads.
        lengths: tokens of each rank of the group. None: ranks agree on them by one more small message.
        replicated: q, k and v [B, H, R, D] of tokens that are the same on every rank.
        replicated_at: whether they come before all others or after them.
        transport: `collective` or `paired`.
        codec: `none`, `int8` or `e4m3`, in which q, k, v, the output and gradients are sent.
        uncoded: what the codec leaves as it is: query, key, value, output, gradients.

    Example:
        out = tr.sequence_attention(q, k, v, group)
    """
    group = group or dist.group.WORLD
    place = dist.get_rank(group)
    if place < 0:
        raise DataError(f"sequence_attention: rank {dist.get_rank()} is not in the group; call it on the group's ranks")
    if attend is not None and (causal or scaling is not None):
        raise DataError(
            "sequence_attention: causal and scaling are for torch's own attention, and attend is given; let it do both"
        )
    _check((query_BHtD, key_BKtD, value_BKtE), replicated)
    numbers = _lengths(query_BHtD, group) if lengths is None else tuple(lengths)
    if len(numbers) != dist.get_world_size(group) or numbers[place] != query_BHtD.shape[2]:
        raise DataError(
            f"sequence_attention: lengths are {list(numbers)} for {dist.get_world_size(group)} ranks, and rank {place} "
            f"of the group has {query_BHtD.shape[2]} tokens; give the number of tokens of each rank"
        )
    plainly = attend or _sdpa(causal, scaling)
    codecs = Codecs.of(codec, uncoded)
    codecs.check(key_BKtD.shape[-1], value_BKtE.shape[-1])
    row = Partners(group=group.group_name, place=place, tokens=numbers, transport=transport, codecs=codecs)
    exchange = UlyssesExchange(row=row)
    if replicated is None:
        return exchange.around(lambda q, k, v, _: plainly(q, k, v), query_BHtD, key_BKtD, value_BKtE, None)
    more = _Replicated(replicated, row, plainly, first=replicated_at == "start")
    out = exchange.around(more.attend, query_BHtD, key_BKtD, value_BKtE, None)
    return _Together.apply(out, more.gathered())


class _Together(torch.autograd.Function):
    """Two tensors as they are. Where only one of them is used for a loss, the other has a gradient of zeros: each rank
    takes part in the messages of both backwards."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, of_replicated: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), of_replicated.view_as(of_replicated)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _Replicated:
    """Tokens that every rank has: each rank computes them for its heads, and gathers the other heads."""

    def __init__(self, tensors: Three, row: Partners, plainly: AttendPlainly, *, first: bool):
        self.row, self.plainly, self.first = row, plainly, first
        query, key, value = tensors
        self.number = query.shape[2]
        shares = head_shares(query.shape[1], key.shape[1], len(row.tokens))
        self.shares, heads, keys = shares, shares.query[row.place], shares.key[row.place]
        key, value = key[:, keys.start : keys.stop], value[:, keys.start : keys.stop]
        expansion = shares.expansion(row.place)
        if expansion is not None:
            key, value = expanded(key, expansion), expanded(value, expansion)
        self.own = query[:, heads.start : heads.stop], key, value
        self.out = self.own[0]
        if not len(heads):  # nothing, and part of the graph all the same
            self.out = self.out[..., :1].expand(*self.out.shape[:-1], value.shape[-1]) + key.sum() + value.sum()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None) -> Tensor:
        pairs = zip(self.own, (query, key, value))
        out = self.plainly(*(torch.cat(pair if self.first else pair[::-1], dim=2) for pair in pairs))
        sizes = [self.number, out.shape[2] - self.number]
        parts = out.split(sizes if self.first else sizes[::-1], dim=2)
        self.out, rest = parts if self.first else parts[::-1]
        return rest

    def gathered(self) -> Tensor:
        """Return [B, H, R, E]."""
        batch, _, tokens, width = self.out.shape
        numbers = tuple(map(len, self.shares.query))
        column = replace(self.row, tokens=numbers)
        rows_HBW = self.out.transpose(0, 1).flatten(2)
        parts = (MessagePart("output", tokens, width),)
        gathered_HBW = GatherRows.apply(rows_HBW, parts, column, tuple((part,) for part in self.shares.query))
        return gathered_HBW.view(-1, batch, tokens, width).transpose(0, 1)


def _check(tensors: Three, replicated: Three | None) -> None:
    """Raise DataError for tensors that do not fit together."""
    for name, (q, k, v) in (("", tensors), ("replicated ", replicated or tensors)):
        shapes = ", ".join(f"{one} {tuple(x.shape)}" for one, x in zip(("q", "k", "v"), (q, k, v)))
        fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
        if not fits or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]) or q.shape[1] % k.shape[1]:
            raise DataError(
                f"sequence_attention: {name}{shapes}; they are [rows, heads, tokens, width] of the same tokens, with a "
                "number of query heads that the number of key heads divides"
            )
    own, others = ([(x.shape[0], x.shape[1], x.shape[3]) for x in of] for of in (tensors, replicated or tensors))
    if own != others:
        raise DataError(
            f"sequence_attention: q, k and v of replicated tokens have (rows, heads, width) {others}, and of this "
            f"rank's tokens {own}; they are parts of one attention"
        )


def _lengths(query: Tensor, group: Any) -> tuple[int, ...]:
    own = torch.tensor([query.shape[2]], device=query.device)
    gathered = own.new_empty(dist.get_world_size(group))
    gather_equal(gathered, own, group)
    return tuple(gathered.tolist())


def _sdpa(causal: bool, scaling: float | None) -> AttendPlainly:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)

    return attend
