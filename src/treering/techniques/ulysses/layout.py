"""Heads of several tensors as one message for each rank, token by token, and back.

    for rank j, a row for each token:   [heads of q for j | heads of k for j | heads of v for j]

Tokens come before heads, so that what arrives from all ranks, one after the other, is one tensor of all tokens, of
which q, k and v are views; and its gradient goes back as it is.

Shapes: B rows of the batch, H heads, T tokens, D width of a head, W width of a message's row; any of them may be 0.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from treering.techniques.ulysses.shares import Ranges


def widths(shares: Sequence[tuple[Ranges, int]]) -> list[int]:
    """Return for each rank the width W of a token's row.

    Args:
        shares: for each tensor, which of its heads each rank has, and the width D of a head.
    """
    ranks = len(shares[0][0])
    return [sum(len(heads[rank]) * width for heads, width in shares) for rank in range(ranks)]


def pack(tensors: Sequence[Tensor], shares: Sequence[Ranges]) -> Tensor:
    """Return the messages [T, B, W] for all ranks, one after the other and flat.

    Args:
        tensors: [B, H, T, D], in any memory layout.
        shares: for each of them, which of its heads each rank gets.
    """
    rows, _, tokens, _ = tensors[0].shape
    wide = widths([(heads, x.shape[-1]) for heads, x in zip(shares, tensors)])
    flat = tensors[0].new_empty(tokens * rows * sum(wide))
    if all(map(_repeats, shares)):
        blocks_PTBW = flat.view(len(wide), tokens, rows, wide[0])
        for x, columns, heads in _columns(tensors, shares, 0):
            into, given = _in_groups(blocks_PTBW[..., columns], x, heads)
            into.copy_(given.unsqueeze(1).expand_as(into))
        return flat
    for rank, block in enumerate(flat.split([tokens * rows * width for width in wide])):
        block_TBW = block.view(tokens, rows, wide[rank])
        for x, columns, heads in _columns(tensors, shares, rank):
            part = heads[rank]
            if len(part):
                _heads(block_TBW[..., columns], len(part)).copy_(_tokens_first(x[:, part.start : part.stop]))
    return flat


def unpack(flat: Tensor, tensors: Sequence[Tensor], shares: Sequence[Ranges]) -> None:
    """Fill `tensors`, [B, H, T, D], with what all ranks have sent for them; heads of several ranks are summed.

    The sum is in at least float32 and in the order of the ranks.
    """
    rows, _, tokens, _ = tensors[0].shape
    wide = widths([(heads, x.shape[-1]) for heads, x in zip(shares, tensors)])
    if all(map(_repeats, shares)):
        blocks_PTBW = flat.view(len(wide), tokens, rows, wide[0])
        for x, columns, heads in _columns(tensors, shares, 0):
            values, into = _in_groups(blocks_PTBW[..., columns], x, heads)
            total = values[:, 0]
            for more in values[:, 1:].unbind(1):
                total = total.to(torch.promote_types(x.dtype, torch.float32)) + more
            into.copy_(total)
        return
    summed = [_wide_zeros(x) if _overlap(heads) else x for x, heads in zip(tensors, shares)]
    for rank, block in enumerate(flat.split([tokens * rows * width for width in wide])):
        block_TBW = block.view(tokens, rows, wide[rank])
        for i, (x, columns, heads) in enumerate(_columns(summed, shares, rank)):
            part = heads[rank]
            if not len(part):
                continue
            into, values = _tokens_first(x[:, part.start : part.stop]), _heads(block_TBW[..., columns], len(part))
            if x is tensors[i]:
                into.copy_(values)
            else:
                into.add_(values)
    for x, total in zip(tensors, summed):
        if total is not x:
            x.copy_(total)


def views(rows_TBW: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the tensors [B, H, T, D] that rows of tokens consist of.

    Args:
        shapes: (H, D) of each.
    """
    parts = rows_TBW.split([heads * width for heads, width in shapes], dim=-1)
    return [part.unflatten(-1, shape).permute(1, 2, 0, 3) for part, shape in zip(parts, shapes)]


def rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the rows of tokens [T, B, W] that tensors [B, H, T, D] form."""
    rows = [_tokens_first(x).flatten(2) for x in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def _columns(tensors: Sequence[Tensor], shares: Sequence[Ranges], rank: int) -> list[tuple[Tensor, slice, Ranges]]:
    """Return each tensor with its place in a row of `rank`'s message, and its shares."""
    found, start = [], 0
    for x, heads in zip(tensors, shares):
        stop = start + len(heads[rank]) * x.shape[-1]
        found.append((x, slice(start, stop), heads))
        start = stop
    return found


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


def _tokens_first(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.permute(2, 0, 1, 3)


def _in_groups(columns_PTBW: Tensor, x: Tensor, heads: Ranges) -> tuple[Tensor, Tensor]:
    """Return the messages of all ranks as [G, R, T, B, h, D], and the tensor as [G, T, B, h, D].

    Each of the G shares of h heads is for R ranks.
    """
    groups = len(heads) // _repeats(heads)
    each = len(heads[0])
    return _heads(columns_PTBW, each).unflatten(0, (groups, -1)), x.unflatten(1, (groups, each)).permute(1, 3, 0, 2, 4)


@lru_cache(256)  # asked for every message of every layer
def _repeats(heads: Ranges) -> int:
    """Return how many ranks in a row have the same heads, if all have equally many and share them so; else 0. Then one
    copy does for all ranks."""
    each, total = len(heads[0]), max(part.stop for part in heads)
    if not each or total % each or len(heads) % (total // each):
        return 0
    repeats = len(heads) * each // total
    wanted = [range(i // repeats * each, (i // repeats + 1) * each) for i in range(len(heads))]
    return repeats if list(heads) == wanted else 0


def _overlap(heads: Ranges) -> bool:
    parts = [part for part in heads if len(part)]
    return any(part.start < before.stop for before, part in pairwise(parts))


def _wide_zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
