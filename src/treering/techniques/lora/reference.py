"""The reference of dense LoRA, in the symbols of the paper. Slow, single process, float64 if its inputs are."""

import torch
from torch import Tensor


def merged(W_NM: Tensor, A_rM: Tensor, B_Nr: Tensor, scale: float) -> Tensor:
    """Return W + s·BA: the weight that a model with the adapter folded in would have."""
    return W_NM + scale * (B_Nr @ A_rM)


def forward(
    x_TM: Tensor, W_NM: Tensor, A_rM: Tensor, B_Nr: Tensor, scale: float, bias_N: Tensor | None = None
) -> Tensor:
    y_TN = x_TM @ merged(W_NM, A_rM, B_Nr, scale).T
    return y_TN if bias_N is None else y_TN + bias_N


def pissa(W_NM: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (base, A, B) with base + s·BA = W and s·BA the best rank-r approximation of W."""
    U, S, Vh = torch.linalg.svd(W_NM, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    return W_NM - scale * (B @ A), A, B
