"""What form `update` and the adapters must equal: whole matrices P, one process, a few obvious lines."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def closed(Q: Tensor) -> Tensor:
    """I − Q Qᵀ."""
    return torch.eye(Q.shape[-2], dtype=Q.dtype) - Q @ Q.mT


def held_by_weights(W: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """(P_out, P_in) that close the `held` largest singular directions on both ends."""
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return closed(U[..., :held]), closed(Vh.mT[..., :held])


def held_hard(A: Tensor, held: int) -> Tensor:
    """P that closes the `held` directions of most energy."""
    _, Q = torch.linalg.eigh(A.double())
    return closed(Q.flip(-1)[..., :held])


def held_softly(A: Tensor, held: int, damping: float) -> Tensor:
    """P that opens each of the `held` directions by 1 / (e/ē + λ), and the others by one mean value, which is 1."""
    energy, Q = torch.linalg.eigh(A.double())
    energy, Q = energy.flip(-1).clamp_min(0), Q.flip(-1)
    mean = energy.mean(-1, keepdim=True)
    rest = energy[..., held:].mean(-1, keepdim=True).expand_as(energy[..., held:])
    openness = 1 / (torch.cat([energy[..., :held], rest], -1) / mean + damping)
    openness = openness / openness[..., -1:]
    return (Q * openness[..., None, :]) @ Q.mT


def stretch(*operators: Tensor) -> float:
    """What gives back the length that the operators take from a step which points everywhere alike."""
    product = 1.0
    for P in operators:
        product *= float((P.shape[-1] / P.square().sum()).sqrt())
    return product


def trajectory(
    weights: Sequence[Tensor],
    operators: Sequence[tuple[Tensor, Tensor, float]],
    loss: Callable[[Sequence[Tensor]], Tensor],
    optimizer: Callable[[list[Tensor]], Any],
    steps: int,
) -> list[Tensor]:
    """Each weight stepped by c · P_out Δ P_in, where the optimizer saw P_out G P_in. operators: (P_out, P_in, c)."""
    live = [W.detach().clone().requires_grad_() for W in weights]
    stepper = optimizer(live)
    for _ in range(steps):
        stepper.zero_grad()
        loss(live).backward()
        old = [W.detach().clone() for W in live]
        for W, (out, into, _) in zip(live, operators):
            W.grad = out @ W.grad @ into  # type: ignore[operator]
        stepper.step()
        with torch.no_grad():
            for W, before, (out, into, c) in zip(live, old, operators):
                W.copy_(before + c * (out @ (W - before) @ into))
    return [W.detach() for W in live]
