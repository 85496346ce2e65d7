"""Orthogonal bases: of a weight by its singular vectors, of measured inputs by the eigenvectors of their moment.

Computed from the small Gram matrix in float64, which is cheaper than a singular value decomposition in float32 and more
accurate: squaring loses half the digits, and float64 has twice as many. On the accelerator, where there is one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from treering.anatomy.matrices import Matrix
from treering.core.errors import PlanError
from treering.core.full_precision import full_precision


@torch.no_grad()
def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U […, N, R], S […, R] descending and V […, M, R] with W = U diag(S) Vᵀ, in float32 or wider."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if W.shape[-1] >= W.shape[-2]:
        return _wide(W)
    V, S, U = _wide(W.mT)
    return U, S, V


def _wide(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvectors U of W Wᵀ, S, and V = Wᵀ U / S, in the precision that the smallest S requires."""
    device, dtype = W.device, W.dtype
    with full_precision():
        wide = W.to(accelerator()).double()
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
    return U.to(device, dtype), S.to(device, dtype), V.to(device, dtype)


def _orthonormal(US: Tensor) -> Tensor:
    """Return orthonormal columns for U S, where some S are too small to divide by.

    QR proceeds column by column in the order of S, so it changes only what rounding left undetermined, and completes
    the basis with any orthonormal directions, which a rank-deficient W allows.
    """
    V, R = torch.linalg.qr(US)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(V.dtype)
    return V * sign[..., None, :]


@torch.no_grad()
def eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values descending and not negative […, M], Q […, M, M]) of a second moment, in float64."""
    values, Q = torch.linalg.eigh(A.to(accelerator()).double())
    return values.flip(-1).clamp_min(0).to(A.device), Q.flip(-1).to(A.device)


def finite(W: Tensor, matrix: Matrix) -> Tensor:
    """Return W, or raise a PlanError where it has no singular vectors."""
    if not bool(torch.isfinite(W).all()):
        raise PlanError(
            f"osft: {matrix.weight} has values that are not finite, so it has no singular vectors; look at the "
            "checkpoint, or leave the weight out of osft.targets",
            settings=("techniques.osft.targets",),
        )
    return W


def accelerator() -> torch.device:
    """Return the device on which matrices are decomposed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moment(matrix: Matrix, statistics: Mapping[str, Tensor] | None) -> Tensor:
    """Return the measured second moment A of the inputs of `matrix`; one that does not fit the weight is an error."""
    if matrix.block is None:
        raise PlanError(
            f"osft: {matrix.weight} is outside the blocks, where no inputs are measured; leave it out of osft.targets, "
            "train it without protection with osft.train, or set osft.protect to weights",
            settings=("techniques.osft.targets", "techniques.osft.protect"),
        )
    if statistics is None or "inputs" not in statistics:
        raise PlanError(
            f"osft: the statistics have nothing on the inputs of {matrix.weight}; measure this model again "
            "(treering measure), leave the weight out of osft.targets, or set osft.protect to weights",
            settings=("statistics.path", "techniques.osft.targets"),
        )
    A = statistics["inputs"]
    if tuple(A.shape) != matrix.input_moment:
        raise PlanError(
            f"osft: the statistics hold {tuple(A.shape)} for {matrix.weight}, whose inputs need {matrix.input_moment}; "
            "they were measured on another model",
            settings=("statistics.path",),
        )
    if not bool(torch.isfinite(A).all()):
        raise PlanError(f"osft: the statistics of {matrix.weight} are not finite; measure again in a wider dtype")
    return A
