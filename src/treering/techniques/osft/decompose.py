"""Orthogonal bases: of a weight by its singular vectors, of measured inputs by eigenvectors.

Through the small Gram matrix in float64, which is cheaper than a singular value decomposition in float32 and more
accurate: squaring loses half the digits, and float64 has twice as many. On the accelerator, where there is one.
"""

import torch
from torch import Tensor

from treering.core.full_precision import exactly


@torch.no_grad()
def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U […, N, R], S […, R] descending and V […, M, R] with W = U diag(S) Vᵀ, in float32 or wider."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if W.shape[-1] >= W.shape[-2]:
        return _wide(W)
    V, S, U = _wide(W.mT)
    return U, S, V


def _wide(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of W Wᵀ; then V = Wᵀ U / S, in the precision that the smallest S asks for."""
    where, dtype = W.device, W.dtype
    with exactly():
        wide = W.to(_fast()).double()
        values, U = torch.linalg.eigh(wide @ wide.mT)
        U, S = U.flip(-1), values.flip(-1).clamp_min(0).sqrt()
        least = float((S[..., -1:] / S[..., :1].clamp_min(1e-300)).min()) if S.numel() else 1.0
        if dtype == torch.float32 and least > 1e-2:
            narrow = U.float()
            V = (wide.float().mT @ narrow) / S.float()[..., None, :]
        elif dtype == torch.float32 and least > 1e-4:
            V = (wide.mT @ U) / S[..., None, :]
        else:
            V = _orthonormal(wide.mT @ U)
    return U.to(where, dtype), S.to(where, dtype), V.to(where, dtype)


def _orthonormal(US: Tensor) -> Tensor:
    """Directions with next to no singular value have none to divide by. QR goes column by column in order of S, so it
    moves only what rounding left unsure, and fills up with any orthonormal directions, as a rank-deficient W allows."""
    V, R = torch.linalg.qr(US)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(V.dtype)
    return V * sign[..., None, :]


@torch.no_grad()
def eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """(values descending and not negative […, M], Q […, M, M]) of a second moment, in float64."""
    values, Q = torch.linalg.eigh(A.to(_fast()).double())
    return values.flip(-1).clamp_min(0).to(A.device), Q.flip(-1).to(A.device)


def _fast() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
