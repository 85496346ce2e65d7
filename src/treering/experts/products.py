"""Products of sorted rows with a stack of matrices, one matrix for each group of rows.

    x_SK    rows, sorted by expert          w_EKN   one matrix for each expert          offsets_E   where groups end

    rows_by_stack(x, w)[s]  = x[s] · w[expert of s]                                [S, N]
    rows_by_rows(x, g)[e]   = Σ over rows s of expert e of  x[s]ᵀ g[s]             [E, K, N]: gradients of a stack

`grouped_mm` computes each in one call. What it does not take (float64, strides that are no multiple of 16 bytes, other
devices) is computed in a loop over experts, `reference.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from treering.experts import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of every stride that is not 1: grouped_mm refuses others, on CPU too


def rows_by_stack(x_SK: Tensor, w_EKN: Tensor, offsets: Tensor) -> Tensor:
    """Return [S, N]: each row times the matrix of its expert. All rows belong to an expert."""
    if _takes(x_SK, w_EKN):
        return F.grouped_mm(x_SK, w_EKN, offs=offsets)
    return reference.rows_by_stack(x_SK, w_EKN, offsets)


def rows_by_rows(x_SK: Tensor, g_SN: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, K, N]: for each expert the sum over its rows of xᵀ g; zeros where it has none."""
    if _takes(x_SK.mT, g_SN):
        product = F.grouped_mm(x_SK.mT, g_SN, offs=offsets)
        if x_SK.device.type == "cpu":
            return product
        # Some CUDA kernels leave the result of an empty group unwritten.
        empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
        return product.masked_fill_(empty[:, None, None], 0)
    return reference.rows_by_rows(x_SK, g_SN, offsets)


def stack_product(x_SM: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    """Return x Wᵀ for rows [S, M] and a stack [E, N, M], which may be a transposed view. Differentiable in both."""
    return _StackProduct.apply(x_SM.to(W.dtype), W, offsets)


def low_rank(x_SM: Tensor, A_ErM: Tensor, B_ENr: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Return scale · x Aᵀ Bᵀ by expert, computed in the dtype of A and returned in that of x.

    Saved for the backward: x itself, which the base product saves as well, and the [S, r] product scale · x Aᵀ.
    """
    return _LowRank.apply(x_SM, A_ErM, B_ENr, offsets, scale)


class _StackProduct(torch.autograd.Function):
    """`grouped_mm` with a backward of its own: torch's refuses gradients with strides of 0, as `sum` gives them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W, offsets)
        return rows_by_stack(x, W.mT, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, offsets = ctx.saved_tensors
        g = g.contiguous()
        dx = rows_by_stack(g, W, offsets) if ctx.needs_input_grad[0] else None
        dW = rows_by_rows(g, x, offsets) if ctx.needs_input_grad[1] else None
        return dx, dW, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float) -> Tensor:
        low = _scaled(rows_by_stack(x.to(A.dtype), _padded(A, 1).mT, offsets), scale)
        ctx.save_for_backward(x, A, B, low, offsets)
        ctx.scale = scale
        return rows_by_stack(low, _padded(B, 2).mT, offsets).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, low, offsets = ctx.saved_tensors
        rank = A.shape[1]
        g = g.to(A.dtype).contiguous()
        dx = dA = dB = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dlow = _scaled(rows_by_stack(g, _padded(B, 2), offsets), ctx.scale)  # [S, r]
        if ctx.needs_input_grad[0]:
            dx = rows_by_stack(dlow, _padded(A, 1), offsets).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dA = rows_by_rows(dlow, x.to(A.dtype), offsets)[:, :rank].contiguous()
        if ctx.needs_input_grad[2]:
            dB = rows_by_rows(g, low, offsets)[..., :rank].contiguous()
        return dx, dA, dB, None, None


def _scaled(low_Sr: Tensor, scale: float) -> Tensor:
    """Scale the narrow products, in place: the wide ones have N / r times as many elements."""
    return low_Sr if scale == 1.0 else low_Sr.mul_(scale)


def _padded(factor: Tensor, dim: int) -> Tensor:
    """Fill the rank of A [E, r, M] or B [E, N, r] with zeros, which add nothing, up to what grouped_mm can read."""
    step = _ALIGNMENT // factor.element_size()
    missing = -factor.shape[dim] % step
    if not missing:
        return factor
    return F.pad(factor, (0, missing) if dim == 2 else (0, 0, 0, missing))


def _takes(a: Tensor, b: Tensor) -> bool:
    """Return whether grouped_mm can compute this product of a with b."""
    if a.dtype not in _DTYPES or a.dtype != b.dtype or not a.numel() or not b.numel():
        return False
    if isinstance(a, FakeTensor):  # where memory is planned, on a device of no kind: sizes alone matter
        return _aligned(a) and _aligned(b)
    if a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) < (8, 0):
        return False
    return a.device.type in ("cpu", "cuda") and _aligned(a) and _aligned(b)


def _aligned(t: Tensor) -> bool:
    """One of the last two strides is 1, and the others are whole multiples of 16 bytes."""
    last = t.stride()[-2:]
    if 1 not in last:
        return False
    others = list(t.stride())
    others.remove(1)
    if any(stride * t.element_size() % _ALIGNMENT for stride in others):
        return False
    return isinstance(t, FakeTensor) or t.data_ptr() % _ALIGNMENT == 0
