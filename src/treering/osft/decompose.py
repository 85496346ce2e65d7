"""Orthogonal bases: of a weight by its singular vectors, of measured inputs by eigenvectors."""

import torch
from torch import Tensor

GRAM = 2.0  # a matrix this much longer than wide is cheaper through its small Gram matrix, in float64


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U […, N, R], S […, R] descending and V […, M, R] with W = U diag(S) Vᵀ, in float32 or wider."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    N, M = W.shape[-2:]
    if max(N, M) < GRAM * min(N, M):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U, S, Vh.mT
    return through_gram(W) if M >= N else _flip(through_gram(W.mT))


def through_gram(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a wide W: eigenvectors of W Wᵀ, then V = Wᵀ U / S.

    Squaring loses half the digits: float64 keeps those of float32. Directions with next to no singular value have none
    to divide by; a QR factorisation fills V up with any orthonormal directions, as a rank-deficient W allows.
    """
    wide = W.double()
    values, U = torch.linalg.eigh(wide @ wide.mT)
    U = U.flip(-1)
    S = values.flip(-1).clamp_min(0).sqrt()
    # QR orthonormalises column by column in order of S, so it moves only what rounding left unsure.
    V, R = torch.linalg.qr(wide.mT @ U)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(V.dtype)
    return U.to(W.dtype), S.to(W.dtype), (V * sign[..., None, :]).to(W.dtype)


def _flip(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    V, S, U = found
    return U, S, V


def eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """(values descending and not negative […, M], Q […, M, M]) of a second moment, computed in float64."""
    values, Q = torch.linalg.eigh(A.double())
    return values.flip(-1).clamp_min(0), Q.flip(-1)
