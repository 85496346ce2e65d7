"""The reference that the fast forms must equal: one process, complete matrices, a few plain lines.

Factored forms: `split`, `rebuild`, `linear`, `trajectory`. Form `update` and the adapters: complete operators P and c,
where a step Δ becomes c · P_out Δ P_in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def project(X: Tensor, Q: Tensor) -> Tensor:
    """Return (I − Q Qᵀ) X."""
    return X - Q @ (Q.mT @ X)


# --- a weight as its singular factors


def split(W_NM: Tensor, protected: int) -> dict[str, Tensor]:
    """Return the `protected` largest singular triples (high) and the rest (low); V is M×k, like U is N×k."""
    U, S, Vh = torch.linalg.svd(W_NM, full_matrices=False)
    V = Vh.mT
    high = {"U_high": U[..., :protected], "S_high": S[..., :protected], "V_high": V[..., :protected]}
    return high | {"U_low": U[..., protected:], "S_low": S[..., protected:], "V_low": V[..., protected:]}


def rebuild(f: dict[str, Tensor]) -> Tensor:
    """Return W of its factors."""
    high = (f["U_high"] * f["S_high"][..., None, :]) @ f["V_high"].mT
    return high + (f["U_low"] * f["S_low"][..., None, :]) @ f["V_low"].mT


def linear(x: Tensor, f: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b of a factored W."""
    y = x @ rebuild(f).mT
    return y if bias is None else y + bias


def trajectory(
    W: Tensor, protected: int, loss: Callable[[Tensor], Tensor], optimizer: Callable[[list[Tensor]], Any], steps: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Project gradients, step, project parameters. Returns the last W and its factors."""
    f = {name: value.detach().clone() for name, value in split(W, protected).items()}
    low = [f[name].requires_grad_() for name in ("U_low", "S_low", "V_low")]
    stepper = optimizer(low)
    for _ in range(steps):
        stepper.zero_grad()
        loss(rebuild(f)).backward()
        for end in ("U", "V"):
            f[f"{end}_low"].grad = project(f[f"{end}_low"].grad, f[f"{end}_high"])  # type: ignore[arg-type]
        stepper.step()
        with torch.no_grad():
            for end in ("U", "V"):
                f[f"{end}_low"].copy_(project(f[f"{end}_low"], f[f"{end}_high"]))
    return rebuild(f).detach(), {name: value.detach() for name, value in f.items()}


# --- complete operators


def complement(Q: Tensor) -> Tensor:
    """Return I − Q Qᵀ."""
    return torch.eye(Q.shape[-2], dtype=Q.dtype) - Q @ Q.mT


def protect_weights(W: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Return (P_out, P_in) that protect the `protected` largest singular directions on both ends."""
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return complement(U[..., :protected]), complement(Vh.mT[..., :protected])


def protect_hard(A: Tensor, protected: int) -> Tensor:
    """Return P that protects the `protected` directions of most energy."""
    _, Q = torch.linalg.eigh(A.double())
    return complement(Q.flip(-1)[..., :protected])


def protect_softly(A: Tensor, protected: int, damping: float) -> Tensor:
    """Return P with values 1 / (e/ē + λ) in the `protected` directions, and one mean value, scaled to 1, elsewhere."""
    energy, Q = torch.linalg.eigh(A.double())
    energy, Q = energy.flip(-1).clamp_min(0), Q.flip(-1)
    mean = energy.mean(-1, keepdim=True)
    rest = energy[..., protected:].mean(-1, keepdim=True).expand_as(energy[..., protected:])
    values = 1 / (torch.cat([energy[..., :protected], rest], -1) / mean + damping)
    values = values / values[..., -1:]
    return (Q * values[..., None, :]) @ Q.mT


def step_scale(*operators: Tensor) -> float:
    """Return c, which restores the length of a step that points everywhere alike."""
    product = 1.0
    for P in operators:
        product *= float((P.shape[-1] / P.square().sum()).sqrt())
    return product
