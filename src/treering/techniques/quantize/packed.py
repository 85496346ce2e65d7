"""A weight that is stored as codes and scales, and decoded where it multiplies.

    y = x Q(W)ᵀ         dx = g Q(W)

The backward decodes again: what autograd keeps are the codes, which are there anyway, and not a decoded copy for each
weight of the model. Of a stack of experts only those with tokens are decoded, a group of them at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from treering.core.module_forward import ModuleForward
from treering.experts.products import rows_by_stack
from treering.experts.routing import Routing
from treering.formats import Format

GROUP_BYTES = 64 << 20  # of decoded experts at a time


class PackedWeight(nn.Module):
    """The tensors of one weight, [..., outputs, inputs], as frozen uint8 parameters.

    A child module of its own, called with what it multiplies: FSDP gathers its parameters for that call.

    Args:
        form: the number format.
        shape: of the weight, outputs before inputs, experts in front.
        plain_dtype: that the weight would have as a plain parameter.
        rounding: what decoded weights are rounded to before they are cast to the dtype of the product; None: to none.
    """

    def __init__(
        self,
        form: Format,
        shape: tuple[int, ...],
        device: torch.device,
        plain_dtype: torch.dtype,
        rounding: torch.dtype | None = None,
    ):
        super().__init__()
        self.form, self.shape, self.plain_dtype, self.rounding = form, shape, plain_dtype, rounding
        *stack, rows, columns = shape
        for key, piece in form.pieces(rows, columns).items():
            empty = torch.empty(*stack, *piece.shape, dtype=torch.uint8, device=device)
            self.register_parameter(key, nn.Parameter(empty, requires_grad=False))

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters())

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return x Q(W)ᵀ; rows of a stack are sorted by expert, and end at `offsets`."""
        tensors = tuple(getattr(self, key) for key in self.keys)
        return _PackedProduct.apply(x, self, offsets, self.keys, *tensors)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight that `tensors` hold, of all experts or of some."""
        if self.rounding is None:
            return self.form.decode(tensors, self.shape[-1], dtype)
        return self.form.decode(tensors, self.shape[-1], self.rounding).to(dtype)


class PackedForward(ModuleForward):
    """The forward of a linear whose weight is packed."""

    as_method = True

    def __init__(self, module: nn.Module, packed: PackedWeight):
        super().__init__(module)
        self.packed = packed

    def __call__(self, x: Tensor) -> Tensor:
        y = self.packed(x)
        bias: Any = self.module.bias
        return y if bias is None else y + bias


class PackedExperts:
    """The source of a stack's weight for `GroupedForward`."""

    def __init__(self, packed: PackedWeight):
        self.packed = packed

    def product(self, x_SM: Tensor, routing: Routing) -> Tensor:
        return self.packed(x_SM, routing.offsets)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: PackedWeight,
        offsets: Tensor | None,
        keys: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(offsets, *tensors)
        ctx.weight, ctx.keys = weight, keys
        packed = dict(zip(keys, tensors, strict=True))
        if offsets is None:
            return F.linear(x, weight.decode(packed, x.dtype))
        product = lambda rows, W, ends: rows_by_stack(rows, W.mT, ends)  # noqa: E731
        return by_groups(x, offsets, weight.shape, _decoder(weight, packed, x.dtype), product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        offsets, *tensors = ctx.saved_tensors
        packed = dict(zip(ctx.keys, tensors, strict=True))
        dx = None
        if ctx.needs_input_grad[0] and offsets is None:
            dx = g @ ctx.weight.decode(packed, g.dtype)
        elif ctx.needs_input_grad[0]:
            decoded = _decoder(ctx.weight, packed, g.dtype)
            dx = by_groups(g.contiguous(), offsets, ctx.weight.shape, decoded, rows_by_stack)
        return dx, *(None for _ in range(3 + len(tensors)))


def _decoder(weight: PackedWeight, packed: Mapping[str, Tensor], dtype: torch.dtype) -> Callable[[list[int]], Tensor]:
    return lambda experts: weight.decode(_some(packed, experts), dtype)


def by_groups(
    x: Tensor,
    offsets: Tensor,
    shape: tuple[int, ...],
    weights: Callable[[list[int]], Tensor],
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the rows of `product`, computed for groups of experts that have tokens.

    Rows are sorted by expert, so those of consecutive experts with tokens are consecutive too.

    Args:
        x: the rows.
        offsets: where those of each expert end.
        shape: of the stack [experts, outputs, inputs].
        weights: computes the weights of some experts.
        product: (rows, weights, offsets) → rows.
    """
    size = max(1, GROUP_BYTES // (shape[-1] * shape[-2] * x.element_size()))
    if isinstance(offsets, FakeTensor) or offsets.is_meta:  # sizes alone are computed: as if one group had all tokens
        group = list(range(min(size, shape[0])))
        return product(x, weights(group), offsets[: len(group)])
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    hit = [e for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
    if not hit:
        return product(x, weights([0]), offsets[:1])
    out = []
    for first in range(0, len(hit), size):
        group = hit[first : first + size]
        start = starts[group[0]]
        W = weights(group)
        inside = torch.tensor([ends[e] - start for e in group], dtype=torch.int32, device=x.device)
        out.append(product(x[start : ends[group[-1]]], W, inside))
    return torch.cat(out) if len(out) > 1 else out[0]


def _some(packed: Mapping[str, Tensor], experts: list[int]) -> dict[str, Tensor]:
    """Return the tensors of a few experts: views where they are consecutive."""
    first, last = experts[0], experts[-1]
    if last - first + 1 == len(experts):
        return {key: t[first : last + 1] for key, t in packed.items()}
    index = torch.tensor(experts, device=next(iter(packed.values())).device)
    return {key: t.index_select(0, index) for key, t in packed.items()}
