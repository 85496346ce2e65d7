"""Three ways to compute y = x Wᵀ + b of a factored W, equal but for rounding.

    W = B_h V_hᵀ + B_l V_lᵀ        B_h = U_h diag(S_h), N×h and frozen        B_l = U_l diag(S_l), N×l and trained

    factored   y = (x V_h) B_hᵀ + (x V_l) B_lᵀ     two thin chains, no weight is formed
    dense      the frozen part is formed as a weight, the trained part stays a chain
    rebuilt    one weight of all factors: the cheapest per token, and forming it costs as much as R tokens more

Projected, U_l stands for (I − U_h U_hᵀ) U_l and V_l for (I − V_h V_hᵀ) V_l: in the factors' own dtype, whatever that of
the tokens, because in bfloat16 the bases are not orthonormal (3e-3).

Only x and the factors themselves are kept until the backward, which computes the rest again: kept, the weights or
casts of all layers would be in memory at once, which sharding avoids.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from treering.core.full_precision import full_precision

Way = Literal["factored", "dense", "rebuilt"]
WAYS: tuple[Way, ...] = ("factored", "dense", "rebuilt")
Pair = tuple[Tensor, Tensor]  # (B, V)
Triple = tuple[Tensor, Tensor, Tensor]  # (U, S, V)


def multiplications(way: Way, tokens: int, N: int, M: int, h: int, l: int, trained: bool) -> int:
    """Return the multiply-adds of one forward and, if `trained`, of its backward; projections are the same for all."""
    chain = tokens * l * (N + M)
    if way == "factored":
        forward = tokens * (h + l) * (N + M)
        backward = forward + chain + tokens * l * M  # x V_l once more
    elif way == "dense":
        forward = N * M * h + tokens * N * M + chain
        backward = forward + chain + tokens * l * M
    else:
        forward = N * M * (h + l) + tokens * N * M
        backward = forward + tokens * N * M + 2 * N * M * l  # ∂W, and from it ∂B_l and ∂V_l
    return forward + (backward if trained else 0)


def choose(tokens: int, N: int, M: int, h: int, l: int, trained: bool) -> Way:
    """Return the way with the fewest multiply-adds. In the forward alone, rebuilding pays from max(N, M) tokens on."""
    return min(WAYS, key=lambda way: multiplications(way, tokens, N, M, h, l, trained))


def project(X: Tensor, Q: Tensor | None) -> Tensor:
    """Return (I − Q Qᵀ) X; X itself where nothing is protected."""
    if Q is None:
        return X
    with full_precision():
        return X - Q @ (Q.mT @ X)


def weight(high: Triple | None, low: Triple, projected: bool, dtype: torch.dtype) -> Tensor:
    """Return W itself, differentiable in the low factors, with a leading dimension if it stacks experts."""
    U_l, S_l, V_l = low
    if high is not None and projected:
        U_l, V_l = project(U_l, high[0]), project(V_l, high[2])
    W = (U_l * S_l[..., None, :]) @ V_l.mT
    if high is not None:
        W = W + (high[0] * high[1][..., None, :]) @ high[2].mT
    return W.to(dtype)


def linear(x: Tensor, bias: Tensor | None, high: Triple | None, low: Triple, *, way: Way, projected: bool) -> Tensor:
    """Return y […, N] of x […, M], in the dtype of x."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the bases before they project
        return _Linear.apply(way, projected, x, bias, *(high or (None, None, None)), *low)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Way, projected: bool, x: Tensor, bias: Tensor | None, *factors: Any) -> Tensor:
        ctx.way, ctx.projected = way, projected
        ctx.save_for_backward(x, bias, *factors)
        high, low, _ = _pairs(projected, x.dtype, *factors)
        x_TM = x.reshape(-1, x.shape[-1])
        bias = None if bias is None else bias.to(x.dtype)
        if way == "rebuilt":
            y_TN = F.linear(x_TM, _product(high, low), bias)
        elif high is None:
            y_TN = F.linear(x_TM @ low[1], low[0], bias)
        else:
            y_TN = F.linear(x_TM, _product(high), bias) if way == "dense" else F.linear(x_TM @ high[1], high[0], bias)
            y_TN.addmm_(x_TM @ low[1], low[0].T)
        return y_TN.view(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, *factors = ctx.saved_tensors
        U_h, _, V_h, _, S_l, _ = factors
        with torch.autocast(x.device.type, enabled=False):
            high, low, U = _pairs(ctx.projected, x.dtype, *factors)
            x_TM, g_TN = x.reshape(-1, x.shape[-1]), incoming[0].reshape(-1, incoming[0].shape[-1]).to(x.dtype)
            if ctx.way == "rebuilt":
                dx = g_TN @ _product(high, low) if ctx.needs_input_grad[2] else None
                dW = g_TN.T @ x_TM
                dB, dV = dW @ low[1], dW.T @ low[0]
            else:
                gB_Tl = g_TN @ low[0]
                dB, dV = g_TN.T @ (x_TM @ low[1]), x_TM.T @ gB_Tl
                dx = _towards_x(ctx.way, g_TN, gB_Tl, high, low) if ctx.needs_input_grad[2] else None
            dB, dV = dB.to(S_l.dtype), dV.to(S_l.dtype)
            dU, dS = dB * S_l, (U * dB).sum(0)
            if ctx.projected:
                dU, dV = project(dU, U_h), project(dV, V_h)
        db = g_TN.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
        return None, None, None if dx is None else dx.view_as(x), db, None, None, None, dU, dS, dV


def _pairs(
    projected: bool,
    dtype: torch.dtype,
    U_h: Tensor | None,
    S_h: Tensor | None,
    V_h: Tensor | None,
    U_l: Tensor,
    S_l: Tensor,
    V_l: Tensor,
) -> tuple[Pair | None, Pair, Tensor]:
    """Return (B_h, V_h), (B_l, V_l) in the dtype of the tokens, and the U_l of that B_l in its own."""
    high = None
    if U_h is not None and S_h is not None and V_h is not None:
        high = (U_h * S_h).to(dtype), V_h.to(dtype)
    if projected:
        U_l, V_l = project(U_l, U_h), project(V_l, V_h)
    return high, ((U_l * S_l).to(dtype), V_l.to(dtype)), U_l


def _product(*pairs: Pair | None) -> Tensor:
    """Return Σ B Vᵀ."""
    first, *rest = [pair for pair in pairs if pair is not None]
    W = first[0] @ first[1].T
    for B, V in rest:
        W.addmm_(B, V.T)
    return W


def _towards_x(way: Way, g_TN: Tensor, gB_Tl: Tensor, high: Pair | None, low: Pair) -> Tensor:
    if high is None:
        return gB_Tl @ low[1].T
    dx = g_TN @ _product(high) if way == "dense" else (g_TN @ high[0]) @ high[1].T
    return dx.addmm_(gB_Tl, low[1].T)
