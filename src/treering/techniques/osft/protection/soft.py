"""Soft protection of every direction by its own use, without its directions.

    P = p (A/ē + λ I)⁻¹          ē the mean eigenvalue of A; p so that the largest eigenvalue of P is about 1

by Cholesky factors, in float64: a quarter of the time of eigenvectors.
"""

import torch
from torch import Tensor

from treering.core import seeds
from treering.core.full_precision import full_precision
from treering.techniques.osft.protection.decompose import accelerator, eigen

ROUNDS = 20  # of power iteration: p is a matter of scale, and c of a step is computed for the P that there is
SEED = 0  # where it starts: one place for every run, because results are kept


@torch.no_grad()
def soft_operator(A: Tensor, damping: float) -> Tensor:
    """Return P of inputs with the second moment A […, M, M], in float64.

    Where nothing was measured (an expert that saw no token) nothing is protected.
    """
    with full_precision():
        wide = A.to(accelerator()).double()
        mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
        P = _inverse(wide / torch.where(mean > 0, mean, torch.ones_like(mean))[..., None, None], damping)
        return (P / _largest_eigenvalue(P)[..., None, None]).to(A.device)


def _inverse(A: Tensor, damping: float) -> Tensor:
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    factor, failed = torch.linalg.cholesky_ex(A + damping * identity)
    if not bool(failed.any()):
        return torch.cholesky_inverse(factor)
    energy, Q = eigen(A)  # the damping is smaller than what rounding made of an eigenvalue of 0
    return (Q / (energy + damping)[..., None, :]) @ Q.mT


def _largest_eigenvalue(P: Tensor) -> Tensor:
    draw = seeds.generator(SEED, "osft scale", P.shape[-1])
    x = torch.randn(P.shape[-1], 1, generator=draw, dtype=P.dtype).to(P.device).expand(*P.shape[:-1], 1)
    for _ in range(ROUNDS):
        x = P @ (x / x.norm(dim=-2, keepdim=True))
    return x.norm(dim=-2)[..., 0]
