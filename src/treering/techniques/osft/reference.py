"""What the fast forms must equal: one process, whole matrices, a few obvious lines."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def split(W_NM: Tensor, held: int) -> dict[str, Tensor]:
    """The `held` largest singular triples, and the rest; V is M×k, like U is N×k."""
    U, S, Vh = torch.linalg.svd(W_NM, full_matrices=False)
    V = Vh.mT
    high = {"U_high": U[..., :held], "S_high": S[..., :held], "V_high": V[..., :held]}
    return high | {"U_low": U[..., held:], "S_low": S[..., held:], "V_low": V[..., held:]}


def rebuild(f: dict[str, Tensor]) -> Tensor:
    high = (f["U_high"] * f["S_high"][..., None, :]) @ f["V_high"].mT
    return high + (f["U_low"] * f["S_low"][..., None, :]) @ f["V_low"].mT


def project(X: Tensor, Q: Tensor) -> Tensor:
    """(I − Q Qᵀ) X."""
    return X - Q @ (Q.mT @ X)


def linear(x: Tensor, f: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    y = x @ rebuild(f).mT
    return y if bias is None else y + bias


def trajectory(
    W: Tensor, held: int, loss: Callable[[Tensor], Tensor], optimizer: Callable[[list[Tensor]], Any], steps: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Project gradients, step, project parameters. Returns the last W and its factors."""
    f = {name: value.detach().clone() for name, value in split(W, held).items()}
    low = [f[name].requires_grad_() for name in ("U_low", "S_low", "V_low")]
    stepper = optimizer(low)
    for _ in range(steps):
        stepper.zero_grad()
        loss(rebuild(f)).backward()
        for side in ("U", "V"):
            f[f"{side}_low"].grad = project(f[f"{side}_low"].grad, f[f"{side}_high"])  # type: ignore[arg-type]
        stepper.step()
        with torch.no_grad():
            for side in ("U", "V"):
                f[f"{side}_low"].copy_(project(f[f"{side}_low"], f[f"{side}_high"]))
    return rebuild(f).detach(), {name: value.detach() for name, value in f.items()}
