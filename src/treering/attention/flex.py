"""CUDA: softcap by flex_attention, with a block mask computed from the documents' borders, never from an S × S mask.

Shapes: H query heads, K key heads, T tokens, D and E widths.
"""

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from treering.attention.documents import Documents

BLOCK = 128  # flex_attention's own block size

_masks: "WeakKeyDictionary[Documents, dict[int | None, BlockMask]]" = WeakKeyDictionary()


def flex(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTE: Tensor,
    documents: Documents,
    *,
    scaling: float,
    softcap: float,
    window: int | None = None,
) -> Tensor:
    """Return H × T × E. All layers of one step share the block mask of their window."""

    # A tensor, because a captured number becomes a symbol under `dynamic=True`, which flex_attention cannot lower.
    limit = torch.full((), softcap, device=query_HTD.device)

    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    masks = _masks.setdefault(documents, {})
    if window not in masks:
        masks[window] = block_mask(documents, window)
    kernel: Any = _compiled() if query_HTD.is_cuda else flex_attention
    return kernel(
        query_HTD[None], key_KTD[None], value_KTE[None], score_mod=cap, block_mask=masks[window],
        scale=scaling, enable_gqa=len(query_HTD) != len(key_KTD),
    )[0]  # fmt: skip


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(documents: Documents, window: int | None) -> BlockMask:
    """Return, per block of queries, the blocks of keys from the first that is seen to itself, and the rule inside."""
    ends = documents.cu_seqlens.long()
    tokens = documents.tokens
    device = ends.device
    document_T = torch.repeat_interleave(
        torch.arange(len(documents.lengths), device=device), ends.diff(), output_size=tokens
    )

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        rule = (document_T[q] == document_T[k]) & (q >= k)
        return rule if window is None else rule & (q - k < window)

    block = torch.arange(-(-tokens // BLOCK), device=device)
    query = block * BLOCK
    first = ends[document_T[query]]
    if window is not None:
        first = torch.maximum(first, query - window + 1)
    first = first // BLOCK
    count = (block - first + 1).int()
    # ascending from `first`; what lies beyond `count` is never read but must be a permutation of the blocks
    order = ((first[:, None] + block) % len(block)).int()
    return BlockMask.from_kv_blocks(
        count[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )
