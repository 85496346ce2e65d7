"""Weights at which encoders differ: random ones, zeros, ties, signed zeros, very small and very large groups."""

import torch
from torch import Tensor

ROWS, COLUMNS = 16, 256


def cases(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(ROWS, COLUMNS, generator=draw)
    columns = torch.exp(2 * torch.randn(COLUMNS, generator=draw))
    blocks = normal.clone()
    blocks[1, :64] = 0
    blocks[2, 64:128] *= 1e-6
    blocks[3] *= 300
    blocks[4, 0::3] = -0.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(ROWS, COLUMNS // 8)
    ties *= torch.where(torch.rand(ROWS, COLUMNS, generator=draw) < 0.5, -1.0, 1.0)
    one_sign = normal.abs() + 0.5
    heavy = normal / (torch.rand(ROWS, COLUMNS, generator=draw) + 0.01)
    weights = {
        "normal": normal,
        "columns": normal * columns,
        "blocks": blocks,
        "ties": ties,
        "one_sign": one_sign,
        "heavy": heavy,
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}
