"""Fake quantization: the weight stays as it is, and multiplies as its number format would hold it.

    y = x Q(W)ᵀ         dx = g Q(W)         dW = gᵀ x, as if Q were the identity (straight through)

Q(W) is computed for each product, in the forward and again in the backward: nothing keeps it in between. It is computed
of the complete weight, or of complete experts, so that groups and scales are the same on any number of ranks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from treering.core.errors import PlanError
from treering.core.full_precision import uncast
from treering.core.module_forward import ModuleForward
from treering.experts.products import rows_by_rows, rows_by_stack
from treering.experts.routing import Routing
from treering.formats import Format
from treering.formats.search import best_clip
from treering.techniques.quantize.packed import by_groups

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix


class FakeQuantizer:
    """Q of one weight.

    Args:
        form: the number format.
        matrix: the weight.
        stored: the dtype in which it is stored.
        cast: the dtype to which it is rounded before it is quantized; None: to none.
        search: whether clips are searched (`best_clip`).
    """

    def __init__(self, form: Format, matrix: "Matrix", stored: torch.dtype, cast: torch.dtype | None, search: bool):
        self.form, self.matrix, self.stored, self.cast, self.search = form, matrix, stored, cast, search
        self.off = 0  # number of `switched_off` contexts that are active

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the format for W [..., outputs, inputs], as stored or as a rank computes with it."""
        if self.cast is None and W.dtype != self.stored:
            raise PlanError(
                f"quantize: {self.matrix.weight} is stored in {_name(self.stored)} and computed with in "
                f"{_name(W.dtype)}, so that it would be quantized from other values than an export has. Set "
                "quantize.cast to bfloat16, or shard.compute to stored",
                settings=("quantize.cast", "shard.compute"),
            )
        with torch.no_grad(), uncast():
            W = W if self.cast is None else W.to(self.cast)
            return self.form.encode(W, clip=best_clip(self.form, W) if self.search else 1.0)

    def __call__(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """Return Q(W) in `dtype`."""
        with torch.no_grad():
            return self.form.decode(self.encode(W), W.shape[-1], dtype)


class FakeForward(ModuleForward):
    """The forward of a linear whose weight is quantized where it multiplies."""

    as_method = True

    def __init__(self, module: nn.Module, quantizer: FakeQuantizer):
        super().__init__(module)
        self.quantizer = quantizer

    @torch.compiler.disable  # a compiled kernel rounds otherwise, and an export would have other codes
    def __call__(self, x: Tensor) -> Tensor:
        if self.quantizer.off:
            return self.call_former(x)
        module: Any = self.module
        y = _FakeProduct.apply(x, self.quantizer.matrix.oriented(module.weight), self.quantizer, None)
        return y if module.bias is None else y + module.bias


class FakeExperts:
    """The source of a stack's weight for `GroupedForward`; `plain` is the one that it replaces."""

    def __init__(self, module: nn.Module, quantizer: FakeQuantizer, plain: Any):
        self.module, self.quantizer, self.plain = module, quantizer, plain

    @torch.compiler.disable
    def product(self, x_SM: Tensor, routing: Routing) -> Tensor:
        if self.quantizer.off:
            return self.plain.product(x_SM, routing)
        W = self.quantizer.matrix.oriented(getattr(self.module, self.quantizer.matrix.leaf))
        return _FakeProduct.apply(x_SM, W, self.quantizer, routing.offsets)


class _FakeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, quantizer: FakeQuantizer, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W, offsets)
        ctx.quantizer = quantizer
        if offsets is None:
            return F.linear(x, quantizer(W, x.dtype))
        return _grouped(x, W, quantizer, offsets, lambda rows, Q, ends: rows_by_stack(rows, Q.mT, ends))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, offsets = ctx.saved_tensors
        g = g.contiguous()
        dx = dW = None
        if ctx.needs_input_grad[0]:
            if offsets is None:
                dx = g @ ctx.quantizer(W, g.dtype)
            else:
                dx = _grouped(g, W, ctx.quantizer, offsets, rows_by_stack)
        if ctx.needs_input_grad[1]:
            x = x.to(g.dtype)
            dW = g.flatten(0, -2).mT @ x.flatten(0, -2) if offsets is None else rows_by_rows(g, x, offsets)
            dW = dW.to(W.dtype)
        return dx, dW, None, None


def _grouped(
    x: Tensor,
    W: Tensor,
    quantizer: FakeQuantizer,
    offsets: Tensor,
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    def quantized(experts: list[int]) -> Tensor:
        first, last = experts[0], experts[-1]
        some = W[first : last + 1] if last - first + 1 == len(experts) else W[experts]
        return quantizer(some, x.dtype)

    return by_groups(x, offsets, tuple(W.shape), quantized, product)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
