"""Modules run in tiles: their trainable parameters, wherever they lie below, become inputs of the tiled function.

While a tile runs again, the modules hold aliases of their parameters, put straight into the dictionaries that hold
parameters: no hook and no `__setattr__` sees it, and after the tile the very objects are back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from treering.techniques.tiling.check import Watchman
from treering.techniques.tiling.engine import Out
from treering.techniques.tiling.tile import tile

Slot = tuple[dict[str, Any], str]


class Region:
    """`fn` of tokens that computes with `modules`; called in tiles."""

    def __init__(self, name: str, modules: Sequence[nn.Module], setting: str):
        self.modules = tuple(modules)
        self.watchman = Watchman(name, self.modules, setting)

    def __call__(
        self,
        fn: Callable[..., Any],
        *tokens: Tensor,
        size: int,
        out: Out = "cat",
        dims: int = 1,
        wide: bool = True,
    ) -> Any:
        self.watchman.inspect(fn, tokens, dims, out)
        held = slots(self.modules)
        count = len(tokens)

        def body(*inputs: Tensor) -> Any:
            with put(held.values(), inputs[count:]):
                return fn(*inputs[:count])

        return tile(body, *tokens, params=list(held), size=size, out=out, dims=dims, wide=wide)


def slots(modules: Sequence[nn.Module]) -> dict[Tensor, list[Slot]]:
    """Trainable parameter -> every place that holds it. One that is shared is one input."""
    found: dict[Tensor, list[Slot]] = {}
    seen = set()
    for module in modules:
        for one in module.modules():
            if id(one) in seen:
                continue
            seen.add(id(one))
            for name, parameter in one._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    found.setdefault(parameter, []).append((one._parameters, name))
    return found


@contextmanager
def put(places: Any, values: Sequence[Tensor]) -> Iterator[None]:
    before = [[(holder, name, holder[name]) for holder, name in place] for place in places]
    try:
        for place, value in zip(before, values):
            for holder, name, _ in place:
                holder[name] = value
        yield
    finally:
        for place in before:
            for holder, name, parameter in place:
                holder[name] = parameter
