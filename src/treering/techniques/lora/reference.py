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


def closest(R_NM: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) with s·BA the best rank-r approximation of R: of what quantizing leaves out, for example."""
    U, S, Vh = torch.linalg.svd(R_NM, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank] / scale


def closest_for_inputs(R_NM: Tensor, C_MM: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) with the least E‖(R − s·BA) x‖² for inputs x with E[x xᵀ] = C, which has an inverse.

    Rows of A have length 1, as those of `closest`: a direction that inputs hardly use would make its row long, and a
    step of an optimizer for its column of B would change the weight by as much.
    """
    values, Q = torch.linalg.eigh(C_MM)
    root, inverse = Q * values.sqrt() @ Q.mT, Q / values.sqrt() @ Q.mT
    A, B = closest(R_NM @ root, rank, scale)
    A = A @ inverse
    length = A.norm(dim=1)
    return A / length[:, None], B * length


def pissa(W_NM: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (base, A, B) with base + s·BA = W and s·BA the best rank-r approximation of W."""
    U, S, Vh = torch.linalg.svd(W_NM, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    return W_NM - scale * (B @ A), A, B
