"""Run any token-wise function in tiles; or modules, whose trainable parameters become inputs of that function.

While a tile of modules runs again, they have aliases of their parameters, put straight into the dictionaries that hold
parameters: no hook and no `__setattr__` sees it, and after the tile the same objects are back. Every rank
computes the length of a tile from its shapes, without a message or a wait for the device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.techniques.tiling.check import TileCheck
from treering.techniques.tiling.engine import run, run_now
from treering.techniques.tiling.settings import Tile
from treering.techniques.tiling.tile_job import Out, TileJob

GIB = 2**30
ALIGNED = 128  # what a budget holds is rounded down to a multiple of it: kernels are slow on ragged rows
SHORTEST = 256  # shorter ones read the weights more often than they save memory
# Of a head W [V, H] that trains. A tile of t tokens has 6 t V H operations in products and moves 12 V H bytes: W twice
# in bfloat16, the sum of its gradient once each way in float32. At 600 TFLOP/s and 3.35 TB/s these take 360 / t of the
# time of the products: 0.18 at 2,048 tokens, 0.70 at the 512 whose logits are 1 GiB with 128,256 words.
SHORTEST_TRAINED = 2048

Slot = tuple[dict[str, Any], str]


def tile_length(tile: Tile, budget: float, bytes_per_token: int, hidden: int) -> int:
    """Return the most tokens that a tile may have.

    budget   what one tile needs at its peak fits into `budget` GiB; the same for batches of any length
    hidden   as many tokens as the model is wide, so that there are ⌈tokens / hidden⌉ tiles: what other systems do
    """
    if tile == "hidden":
        return hidden
    if tile == "budget":
        return max(SHORTEST, int(budget * GIB) // max(1, bytes_per_token) // ALIGNED * ALIGNED)
    return tile


def bounds(total: int, length: int) -> tuple[tuple[int, int], ...]:
    """Return where tiles begin and end: all are of `length`, but the last, which has what is left.

    Tiles as equal as possible would have another length for each length of a batch, and their tensors another size,
    which an allocator that keeps freed memory by its size could not use again.

    >>> bounds(10, 4)
    ((0, 4), (4, 8), (8, 10))
    """
    if length < 1:
        raise ValueError(f"a tile of {length} tokens")
    return tuple(pairwise([*range(0, max(total, 1), length), total]))


@torch.compiler.disable
def tile(
    fn: Callable[..., Any],
    *tokens: Tensor,
    params: Sequence[Tensor] = (),
    size: int,
    out: Out = "cat",
    dims: int = 1,
    wide: bool = True,
    unread: frozenset[int] = frozenset(),
) -> Any:
    """Return `fn(*tokens, *params)`, computed on at most `size` tokens at a time; exact for functions of single tokens.

    tokens   tensors that agree in their first `dims` dimensions, which count tokens; `fn` gets [t, …], or [1, t, …]
             where dims is 2
    params   every weight that `fn` reads and that may need a gradient. One that is not listed gets none
    out      cat: `fn` gives one row a token, and is run again in the backward
             sum: `fn` gives a number, whose gradient is taken at once; or a tuple of one and others that are only added
    wide     sum the gradients of `params` over tiles in float32; False: in the dtype of each
    unread   numbers of those calls of F.linear in `fn` whose results are not read: they are not computed again
    """
    if not tokens or any(x.shape[:dims] != tokens[0].shape[:dims] for x in tokens):
        shapes = ", ".join(str(tuple(x.shape)) for x in tokens) or "none"
        raise PlanError(f"tile: tokens must agree in their first {dims} dimensions; they have the shapes {shapes}")
    lead = tokens[0].shape[:dims]
    cuts = bounds(lead.numel(), size)
    flat = len(cuts) > 1 and dims > 1
    if flat:
        tokens = tuple(x.reshape(-1, *x.shape[dims:]) for x in tokens)
    body = _checked(fn, len(tokens), dims if flat or dims == 1 else 0, out)
    cut = (True,) * len(tokens) + (False,) * len(params)
    laid_out = tuple(lead) if flat and out == "cat" else ()
    job = TileJob(body=body, bounds=cuts, tokens=len(tokens), cut=cut, out=out, wide=wide, lead=laid_out, unread=unread)
    return (run if out == "cat" else run_now)(job, *tokens, *params)


def _checked(fn: Callable[..., Any], tokens: int, dims: int, out: Out) -> Callable[..., Any]:
    """Return `fn` on rows of tokens, with a check that it gives one row a token, which is what tiles are joined by."""

    def body(*inputs: Tensor) -> Any:
        rows = inputs[0].shape[0]
        arguments = [x.reshape(*(1,) * (dims - 1), *x.shape) if dims > 1 else x for x in inputs[:tokens]]
        result = fn(*arguments, *inputs[tokens:])
        outputs = result if isinstance(result, tuple) else (result,)
        if out == "sum":
            if outputs[0].ndim:
                raise PlanError(f"tile: out is sum, and fn gave a tensor of shape {tuple(outputs[0].shape)}")
            return result
        if dims == 0:
            return result
        lead = (*(1,) * (dims - 1), rows)
        if any(tuple(y.shape[:dims]) != lead for y in outputs):
            raise PlanError(
                f"tile: fn got tokens of shape {lead} and gave {', '.join(str(tuple(y.shape)) for y in outputs)}; "
                "it must give one row a token"
            )
        outputs = tuple(y.reshape(rows, *y.shape[dims:]) for y in outputs)
        return outputs if isinstance(result, tuple) else outputs[0]

    return body


class TiledRegion:
    """Modules that a function of tokens computes with; called in tiles."""

    def __init__(self, name: str, modules: Sequence[nn.Module], setting: str):
        self.modules = tuple(modules)
        self.check = TileCheck(name, self.modules, setting)

    def trains(self) -> bool:
        """Return whether any parameter of the modules learns."""
        return any(p.requires_grad for module in self.modules for p in module.parameters())

    def __call__(
        self,
        fn: Callable[..., Any],
        *tokens: Tensor,
        size: int,
        out: Out = "cat",
        dims: int = 1,
        wide: bool = True,
    ) -> Any:
        self.check.inspect(fn, tokens, dims, out)
        places = slots(self.modules)
        count = len(tokens)

        def body(*inputs: Tensor) -> Any:
            with put(places.values(), inputs[count:]):
                return fn(*inputs[:count])

        return tile(
            body, *tokens, params=list(places), size=size, out=out, dims=dims, wide=wide, unread=self.check.unread
        )


def slots(modules: Sequence[nn.Module]) -> dict[Tensor, list[Slot]]:
    """Return, for each trainable parameter, every place where it is stored. One that is shared is one input."""
    places: dict[Tensor, list[Slot]] = {}
    seen = set()
    for module in modules:
        for one in module.modules():
            if id(one) in seen:
                continue
            seen.add(id(one))
            for name, parameter in one._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    places.setdefault(parameter, []).append((one._parameters, name))
    return places


@contextmanager
def put(places: Any, values: Sequence[Tensor]) -> Iterator[None]:
    """Store `values` at `places`, and afterwards what was there before."""
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
