"""The reference: each document by itself, all its scores at once, a softmax with one more column for the sink.

Shapes: B batch, H query heads, K key heads, T tokens, D width of query and key, E width of value.
"""

import math

import torch
from torch import Tensor

from treering.attention.documents import Documents


def reference(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    documents: Documents,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return B × H × T × E. Differentiable by autograd; quadratic memory; any dtype."""
    scaling = 1 / math.sqrt(query_BHTD.shape[-1]) if scaling is None else scaling
    repeat = query_BHTD.shape[1] // key_BKTD.shape[1]
    key_BHTD = key_BKTD.repeat_interleave(repeat, dim=1)
    value_BHTE = value_BKTE.repeat_interleave(repeat, dim=1)
    outputs, start = [], 0
    for length in documents.lengths:
        tokens = slice(start, start + length)
        scores = query_BHTD[:, :, tokens] @ key_BHTD[:, :, tokens].transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        age = torch.arange(length, device=scores.device)[:, None] - torch.arange(length, device=scores.device)
        seen = (age >= 0) & (age < (length if window is None else window))
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks_H is not None:
            sink = sinks_H.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], dim=-1)
        outputs.append(scores.softmax(-1)[..., :length] @ value_BHTE[:, :, tokens])
        start += length
    return torch.cat(outputs, dim=2)
