"""A value that is not computed yet: tokens, and the functions of single tokens that are to be applied to them.

A block's own forward passes it from its norm to its MLP and adds it to the residual; only then is all of it computed,
in tiles, residual included. Anything else that meets it would have to see it whole: that is a layout which we do not
know, and an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core.errors import PlanError

Step = Callable[[Tensor, Sequence[Tensor]], Tensor]

_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


@dataclass(frozen=True, kw_only=True)
class Later:
    """`steps`, each a function of the value so far and of a tile of all `tokens`, begin with a tile of the first."""

    tokens: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    through: tuple[nn.Module, ...] = ()  # the modules that the steps call
    compute: "Callable[[Later], Tensor]"
    error: Callable[[str], PlanError]
    fetched: dict[str, Tensor] = field(default_factory=dict)  # of q, k and v: those that nobody has asked for yet

    def then(self, step: Step, *modules: nn.Module) -> "Later":
        return replace(self, steps=(*self.steps, step), through=(*self.through, *modules), fetched={})

    def call(self, module: nn.Module, plain: Callable[[Tensor], Tensor]) -> "Later":
        return self.then(lambda value, tiles: plain(value), module)

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
        return self.tokens[0].shape

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __add__(self, other: Any) -> Tensor:
        return self.plus(other, first=False)

    def __radd__(self, other: Any) -> Tensor:
        return self.plus(other, first=True)

    def __mul__(self, other: Any) -> "Later":
        if not isinstance(other, int | float):
            raise self.error(f"it is multiplied by a {type(other).__name__}")
        return self.then(lambda value, tiles: value * other)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions, such as whether it can be copied
            raise AttributeError(name)
        raise self.error(f"its {name} is asked for")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDS and len(args) == 2 and not kwargs:
            left, right = args
            return right.plus(left, first=True) if isinstance(right, Later) else left.plus(right, first=False)
        if func is F.dropout and isinstance(args[0], Later):
            rest = args[1:]
            return args[0].then(lambda value, tiles: F.dropout(value, *rest, **kwargs))
        late = next(x for x in (*args, *kwargs.values()) if isinstance(x, Later))
        raise late.error(f"{getattr(func, '__name__', func)} is applied")
