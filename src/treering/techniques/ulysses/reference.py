"""The plain truth: all shares joined, the attention of one process, and the result cut again.

Shapes: B rows, H query heads, K key heads, t tokens of a rank, T of all, D and E widths.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from treering.attention import Documents
from treering.attention.reference import reference as attention
from treering.techniques.ulysses.shares import Grid, Ranges


def joined(shares: Sequence[Tensor], ranges: Sequence[Ranges]) -> Tensor:
    """Return [B, H, T, D] in the order of the tokens, from what each rank has of it."""
    pieces = {}
    for share, of_rank in zip(shares, ranges):
        for part, piece in zip(of_rank, share.split([len(part) for part in of_rank], dim=2)):
            pieces[part.start] = piece
    return torch.cat([pieces[start] for start in sorted(pieces)], dim=2)


def reference(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    documents: Documents,
    grid: Grid,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> list[Tensor]:
    """Return each rank's output [B, H, t, E] from each rank's q, k and v; `documents` are of the complete row."""
    ranges = grid.tokens(documents.tokens)
    query, key, value = (joined(shares, ranges) for shares in (queries, keys, values))
    out = attention(query, key, value, documents, scaling=scaling, window=window, softcap=softcap, sinks_H=sinks_H)
    return [torch.cat([out[:, :, part.start : part.stop] for part in of_rank], dim=2) for of_rank in ranges]
