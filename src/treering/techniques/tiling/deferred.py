"""A value inside a block that is not computed yet: it is to be computed with what follows it, a tile at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core.errors import PlanError
from treering.technique import recomputing
from treering.techniques.tiling.engine import Replay

Step = Callable[[Tensor, Sequence[Tensor]], Tensor]

_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


@dataclass(frozen=True, kw_only=True)
class Deferred:
    """A value that is not computed yet: `steps`, applied in turn, beginning with a tile of the first of `tokens`.

    Each step is a function of the value so far and of a tile of all tokens.
    """

    tokens: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    through: tuple[nn.Module, ...] = ()  # the modules that the steps call
    compute: "Callable[[Deferred], Tensor]"
    error: Callable[[str], PlanError]
    width: int | None = None  # of a row of the value, where it is not that of a row of the first of `tokens`
    fetched: dict[str, Tensor] = field(default_factory=dict)  # of q, k and v: those that were not read yet

    def then(self, step: Step, *modules: nn.Module) -> "Deferred":
        return replace(self, steps=(*self.steps, step), through=(*self.through, *modules), fetched={})

    def call(
        self,
        module: nn.Module,
        plain: Callable[..., Tensor],
        others: Sequence[Tensor] = (),
        width: int | None = None,
    ) -> "Deferred":
        """Return this with a call of a module, which is given a tile of each of `others` too.

        Args:
            width: Of a row of the module's output; None: that of its input.
        """
        first = len(self.tokens)
        places = range(first, first + len(others))
        called = self.then(lambda value, tiles: plain(value, *(tiles[i] for i in places)), module)
        return replace(called, tokens=(*self.tokens, *others), width=width or self.width)

    def on(self, tiles: Sequence[Tensor]) -> Tensor:
        value = tiles[0]
        for step in self.steps:
            value = step(value, tiles)
        return value

    def plus(self, other: Any, *, first: bool) -> Tensor:
        if not isinstance(other, Tensor) or other.shape != self.shape:
            raise self.error(f"a {type(other).__name__} is added")
        old = other is self.tokens[0]  # the residual, most of the time
        tokens = self.tokens if old else (*self.tokens, other)
        place = 0 if old else len(self.tokens)

        def add(value: Tensor, tiles: Sequence[Tensor]) -> Tensor:
            return tiles[place] + value if first else value + tiles[place]

        return self.compute(replace(self.then(add), tokens=tokens))

    @property
    def shape(self) -> torch.Size:
        first = self.tokens[0].shape
        return first if self.width is None else torch.Size((*first[:-1], self.width))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the value has for one token: norms may make another one of that of their input."""
        one = [x.detach().flatten(0, -2)[:1].view(*(1,) * (x.ndim - 1), -1) for x in self.tokens]
        with torch.no_grad(), recomputing("tile"), Replay(one[0].device).again():
            return self.on(one).dtype

    @property
    def device(self) -> torch.device:
        return self.tokens[0].device

    def view(self, *shape: Any) -> "Deferred":
        """Return this: the shape may only be that which it has."""
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if tuple(wanted) != tuple(self.shape):
            raise self.error(f"it is viewed as {tuple(wanted)}")
        return self

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __add__(self, other: Any) -> Tensor:
        return self.plus(other, first=False)

    def __radd__(self, other: Any) -> Tensor:
        return self.plus(other, first=True)

    def __mul__(self, other: Any) -> "Deferred":
        if not isinstance(other, int | float):
            raise self.error(f"it is multiplied by a {type(other).__name__}")
        return self.then(lambda value, tiles: value * other)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by Python itself, when it copies
            raise AttributeError(name)
        raise self.error(f"its {name} is asked for")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDS and len(args) == 2 and not kwargs:
            left, right = args
            return right.plus(left, first=True) if isinstance(right, Deferred) else left.plus(right, first=False)
        if func is F.dropout and isinstance(args[0], Deferred):
            rest = args[1:]
            return args[0].then(lambda value, tiles: F.dropout(value, *rest, **kwargs))
        deferred = next(x for x in (*args, *kwargs.values()) if isinstance(x, Deferred))
        raise deferred.error(f"{getattr(func, '__name__', func)} is applied")
