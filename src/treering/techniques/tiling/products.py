"""What a tile does with y = F.linear(x, W) when it runs again for gradients, T tokens, g the gradient of y:

    ∂W += gᵀ x     in one product, into the sum over tiles: no gradient of the tile, no pass over W to add it
    y              is not computed where nothing reads its values: the last linear of a part, q, k and v

With b bytes an element of W and a sum in float32, a tile reads and writes 8 bytes an element of W for that sum, and
4 + 4 b where its own gradient is made first: see `SHORTEST_TRAINED`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from treering.techniques.tiling.tile_job import Gradient

_aten = torch.ops.aten
# Neither result nor gradients of these need a value of the tensor that they are given: as an operator, as a call.
_ADD: set[Any] = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, _aten.add.Tensor}
_RESHAPE: set[Any] = {
    torch.reshape,
    Tensor.reshape,
    torch.flatten,
    Tensor.flatten,
    Tensor.view,
    Tensor.view_as,
    Tensor.detach,
}
_RESHAPE |= {_aten.view.default, _aten._unsafe_view.default, _aten.detach.default}
_MULTIPLY: set[Any] = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, _aten.mul.Tensor}  # by a number
_CAST: set[Any] = {Tensor.to, _aten._to_copy.default}  # to a dtype
_ADD_TO: set[Any] = {torch.addmm, Tensor.addmm, _aten.addmm.default}  # the first argument alone
_SHAPES = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}
_SHAPES |= {vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")}
_PLAIN = (Tensor, nn.Parameter)


def products(
    sums: Mapping[int, Gradient], unread: frozenset[int], device: torch.device
) -> AbstractContextManager[object]:
    """Return the context in which a tile runs again.

    Args:
        sums: Where the gradient of a weight is added, by the weight's id.
        unread: Numbers of those calls of F.linear, in order, whose result is not read, as `Unread` has found them.
        device: Of the tokens.
    """
    if not (sums or unread) or (device.type != "meta" and torch.is_autocast_enabled(device.type)):
        return nullcontext()  # under autocast, F.linear casts before it multiplies
    return _TileProducts(sums, unread)


class _TileProducts(TorchFunctionMode):
    def __init__(self, sums: Mapping[int, Gradient], unread: frozenset[int]):
        super().__init__()
        self.sums, self.unread, self.calls = sums, unread, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        number, self.calls = self.calls, self.calls + 1
        x, weight, bias = _arguments(*args, **(kwargs or {}))
        total, unread = self.sums.get(id(weight)), number in self.unread
        usual = type(x) in _PLAIN and type(weight) in _PLAIN and x.dtype == weight.dtype and x.ndim > 1
        if not usual or not torch.is_grad_enabled() or (total is None and not unread):
            return func(*args, **(kwargs or {}))
        return _TileLinear.apply(x, weight, bias, total, unread)


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments of F.linear, which has these names."""
    return input, weight, bias


class _TileLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Gradient | None, unread: bool
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.total = total
        if not unread:
            return F.linear(x, weight, bias)
        like = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")
        return Uncomputed(like, x.device, lambda: F.linear(x, weight, bias), (x, weight))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g_TN = g.reshape(-1, g.shape[-1])
        of_x = None if weight is None else g @ weight
        of_weight = None
        if x is not None:
            x_TM = x.reshape(-1, x.shape[-1])
            if ctx.total is None:
                of_weight = g_TN.t() @ x_TM
            else:
                ctx.total.add_product(g_TN, x_TM)
        return of_x, of_weight, g_TN.sum(0) if ctx.needs_input_grad[2] else None, None, None


class Uncomputed(Tensor):
    """A tensor whose values are computed when an operator asks for them, if one ever does. It can be added,
    multiplied and reshaped without, and gradients pass through it like through any other."""

    compute: Callable[[], Tensor]
    sources: tuple[Tensor, ...]
    versions: list[int]
    value: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, like: Tensor, device: torch.device, compute: Callable[[], Tensor], sources: tuple[Tensor, ...] = ()
    ) -> "Uncomputed":
        new: Uncomputed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        new.compute, new.sources, new.value = compute, sources, None
        new.versions = [x._version for x in sources]
        return new

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def values(self) -> Tensor:
        """Return an ordinary tensor."""
        if self.value is None:
            if [x._version for x in self.sources] != self.versions:
                raise RuntimeError("what a linear in a tile was given was changed in place before its result was read")
            with torch.no_grad():
                self.value = self.compute()
            self.sources, self.versions = (), []
        return self.value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        computed = lambda: func(*_values(args), **_values(kwargs))  # noqa: E731
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would change a tensor of a tile in place whose values were not computed")
        if not _blind(func, args, kwargs, cls):
            return computed()
        device = next(x.device for x in args if isinstance(x, cls))
        return cls(func(*tree_map_only(Tensor, _meta, args), **kwargs), device, computed)


def _blind(func: Any, args: Any, kwargs: Any, kind: type[Tensor]) -> bool:
    """Return whether `func` needs no value of those arguments that are of `kind`."""
    if func in _ADD or func in _RESHAPE:
        return True
    if func in _MULTIPLY:
        return sum(isinstance(x, Tensor) for x in args) == 1
    if func in _CAST:
        return all(isinstance(x, torch.dtype) for x in (*args[1:], *kwargs.values()))
    return func in _ADD_TO and not any(isinstance(x, kind) for x in args[1:])


def _values(arguments: Any) -> Any:
    return tree_map_only(Uncomputed, lambda x: x.values(), arguments)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class Unread(TorchFunctionMode):
    """Finds the calls of F.linear whose results a function only adds, reshapes, multiplies by numbers, and returns.

    Example:
        with Unread() as found:
            fn(*tokens)
        unread = found.numbers()
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.read: set[int] = set()

    def numbers(self) -> frozenset[int]:
        return frozenset(range(self.calls)) - self.read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        number, self.calls = self.calls, self.calls + 1
        y = func(*args, **(kwargs or {}))  # reads those among its arguments that are watched
        return _watched(y, frozenset([number]), self.read) if type(y) is Tensor else y


class _WatchedResult(Tensor):
    """An ordinary tensor that reports when it is read: `read` gets the `numbers` of the results that are in it."""

    numbers: frozenset[int]
    read: set[int]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watched, behind = _watched_in((args, kwargs)), _watched_in(args[1:])
        read = watched[0].read
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in _SHAPES:
            return result
        if func in _ADD_TO and isinstance(args[0], cls):
            read.update(*(x.numbers for x in behind))
            return _watched(result, args[0].numbers, read)
        numbers = frozenset[int]().union(*(x.numbers for x in watched))
        if not _blind(func, args, kwargs, cls):
            read.update(numbers)
            return tree_map_only(cls, lambda x: x.as_subclass(Tensor), result)
        return _watched(result, numbers, read)


def _watched_in(arguments: Any) -> list[_WatchedResult]:
    found: list[_WatchedResult] = []
    tree_map_only(_WatchedResult, found.append, arguments)
    return found


def _watched(y: Tensor, numbers: frozenset[int], read: set[int]) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        new = y.as_subclass(_WatchedResult)
    new.numbers, new.read = numbers, read
    return new
