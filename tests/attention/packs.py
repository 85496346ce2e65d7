"""Packed rows of random tokens."""

import torch
from torch import Tensor

from treering.attention import Documents

LENGTHS = (5, 1, 70, 13, 1, 30)  # shorter than the window and longer, longer than a chunk of queries, of one token


def tokens(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, vocabulary: int = 128) -> Tensor:
    return torch.randint(3, vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))


def packed(ids: Tensor, lengths: tuple[int, ...] = LENGTHS) -> dict[str, object]:
    """The model's keyword arguments."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "documents": Documents.of(lengths), "use_cache": False}
