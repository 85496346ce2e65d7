"""Full precision for products that compute weights or keep something orthogonal, whatever the surrounding loop set.

A basis rounded to bfloat16 or TF32 leaks 3e-3 of what it protects. A loop may run under autocast, or may have allowed
TF32 for the complete process: neither affects these products, and both are restored afterwards.

A card multiplies float32 at a tenth of the rate of bfloat16. Where 1e-4 of the result does no harm, as in soft
protection, `product` writes each float32 matrix as a sum of two bfloat16 matrices, and adds three products of these.
Measured on an H100 at sizes of an 8B model: 0.25 to 0.58 of the time, and an error of 6e-6 to 2e-5 of the result, more
than the parts leave out, because the adders of tensor cores lose bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply without autocast and without TF32 inside the context."""
    if _full_already():
        yield
        return
    with uncast():
        if torch.compiler.is_compiling():  # a setting of the process cannot be changed inside a compiled forward
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _full_already() -> bool:
    """Return whether nothing has to be changed: this is asked several times for each layer."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not (autocast or torch.compiler.is_compiling()) and torch.get_float32_matmul_precision() == "highest"


@contextmanager
def uncast() -> Iterator[None]:
    """Switch autocast off inside the context."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in the wider of their dtypes; see above for float32 on a card. Differentiable in both.

    Args:
        a: […, N, M]; it may be bfloat16, which is exact and needs one part instead of two.
        b: [M, K], or a stack [E, M, K] for a stack a.
    """
    if a.ndim > 2 and b.ndim == 2:
        return product(a.reshape(-1, a.shape[-1]), b).view(*a.shape[:-1], b.shape[-1])
    wide = torch.promote_types(a.dtype, b.dtype)
    if not a.is_cuda or wide != torch.float32 or torch.cuda.get_device_capability(a.device) < (8, 0):
        return a.to(wide) @ b.to(wide)
    return _SplitProduct.apply(a, b)


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in the dtype of a, for b in bfloat16. On a card a is rounded as well, and the sum is float32.

    For a step that is projected: its rounding is projected with it, so that nothing gets past the projection.
    """
    if not a.is_cuda or a.dtype != torch.float32:
        return a @ b.to(a.dtype)
    if a.ndim > 2 and b.ndim == 2:
        return _wide(a.reshape(-1, a.shape[-1]).bfloat16(), b).view(*a.shape[:-1], b.shape[-1])
    return _wide(a.bfloat16(), b)


class _SplitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b)
        ctx.dtype = a.dtype
        return split_product(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        da = split_product(g, b.mT).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        db = split_product(a.mT, g).to(b.dtype) if ctx.needs_input_grad[1] else None
        return da, db


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32 from products of bfloat16 parts, for matrices or stacks of them."""
    a_parts, b_parts = _parts(a), _parts(b)
    sum_ = _wide(a_parts[0], b_parts[0])
    # low · low is below what is kept. Each product is added up by itself: a card's adders lose bits in long sums.
    for part in b_parts[1:]:
        sum_ += _wide(a_parts[0], part)
    for part in a_parts[1:]:
        sum_ += _wide(part, b_parts[0])
    return sum_


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of bfloat16 matrices, or of stacks of them, in float32."""
    if not a.is_cuda:
        return a.float() @ b.float()
    return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def _parts(t: Tensor) -> list[Tensor]:
    if t.dtype == torch.bfloat16:
        return [t]
    high = t.bfloat16()
    return [high, (t - high).bfloat16()]
