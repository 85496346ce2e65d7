"""The one autograd function behind every tiling.

A job runs `body(*tiles of tokens, *weights)` once per tile, first without a graph, and in the backward again, tile by
tile, with one. Weights are inputs of the function like any other: their gradients are taken per tile from aliases,
summed here, and given to autograd once. So whatever observes a weight (DDP, FSDP, hooks, accumulation)
sees one gradient, as without tiles.

The tokens are kept by a separate node. In a recomputed region, asking that node for them ends the recomputation
there, before the tiles are run: two forwards in all, not three.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from treering.technique import in_tile, recomputing
from treering.techniques.tiling.products import products
from treering.techniques.tiling.tile_job import Gradient, TileJob


def run(job: TileJob, *inputs: Tensor) -> Any:
    """Return a tensor or a tuple, as `body` returns them."""
    box = _Box()
    tokens, weights = inputs[: job.tokens], inputs[job.tokens :]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tokens):
        tokens = _Keep.apply(box, *tokens)
    outputs = _Tiles.apply(job, box, *tokens, *weights)
    return outputs if box.several else outputs[0]


def run_now(job: TileJob, *inputs: Tensor) -> Any:
    """Return the sum of the numbers that `body` returns; gradients are computed at once, and scaled in the backward."""
    box = _Box()
    outputs = _Now.apply(job, box, torch.is_grad_enabled(), *inputs)
    return outputs if box.several else outputs[0]


class _Box:
    several = False
    node: Any = None


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, box: _Box, *tokens: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tokens)
        box.node = ctx
        seen = tuple(x.view_as(x) for x in tokens)
        ctx.mark_non_differentiable(*(y for x, y in zip(tokens, seen) if not x.requires_grad))
        return seen

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: TileJob, box: _Box, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.job, ctx.box, ctx.replay = job, box, Replay(inputs[0].device)
        # Weights by reference: saved tensors would pass through hooks that offload activations.
        ctx.weights = inputs[job.tokens :]
        ctx.versions = [w._version for w in ctx.weights]
        if box.node is None:
            ctx.save_for_backward(*inputs[: job.tokens])
        with ctx.replay.casting():
            outputs = _forward(job, box, inputs)
        ctx.mark_non_differentiable(*(y for y in outputs if not y.dtype.is_floating_point))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        job: TileJob = ctx.job
        # This may run a surrounding checkpoint's recomputation, which is no tile: before anything else.
        tokens = (ctx if ctx.box.node is None else ctx.box.node).saved_tensors
        if [w._version for w in ctx.weights] != ctx.versions:
            raise RuntimeError(
                "a weight of a tiled region was changed in place between its forward and its backward; step after the "
                "backward is done"
            )
        inputs, needed = (*tokens, *ctx.weights), ctx.needs_input_grad[2:]
        sums = job.gradients(inputs, needed)
        with ctx.replay.again(), _as_tile():
            plain = [x.detach() for x in inputs]
            for start, stop in job.bounds:
                tile = job.tile(plain, start, stop)
                _leaves(tile, sums)
                with in_tile(job.place(start, stop)), products(job.shared(tile, sums), job.unread, tile[0].device):
                    outputs = as_tuple(job.body(*tile))
                incoming = [job.rows(g)[start:stop] if g is not None and job.out == "cat" else g for g in gradients]
                pairs = [(y, g) for y, g in zip(outputs, incoming) if g is not None and y.requires_grad]
                _take(sums, [y for y, _ in pairs], [g.to(y.dtype) for y, g in pairs], tile, start, stop)
                del outputs, pairs, tile
        return (None, None, *(sums[i].result() if i in sums else None for i in range(len(inputs))))


class _Now(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: TileJob, box: _Box, wanted: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[3:]
        if not (wanted and any(needed)):
            return _forward(job, box, inputs)
        sums = job.gradients(inputs, needed)
        total: list[Tensor] = []
        plain = [x.detach() for x in inputs]
        with torch.enable_grad(), _unseen(), Replay(inputs[0].device).casting():
            for start, stop in job.bounds:
                tile = job.tile(plain, start, stop)
                _leaves(tile, sums)
                with in_tile(job.place(start, stop)), products(job.shared(tile, sums), frozenset(), tile[0].device):
                    result = job.body(*tile)
                box.several = isinstance(result, tuple)
                first, *more = as_tuple(result)
                if first.requires_grad:
                    _take(sums, [first], [torch.ones_like(first)], tile, start, stop)
                values = [y.detach() for y in (first, *more)]
                total = values if not total else [a + b for a, b in zip(total, values)]
                del result, first, tile
        results = {i: value for i, gradient in sums.items() if (value := gradient.result()) is not None}
        ctx.indices, ctx.inputs = tuple(results), len(inputs)
        ctx.save_for_backward(*results.values())  # saved, and not an attribute: freed as soon as they are used
        ctx.mark_non_differentiable(*total[1:])
        return tuple(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        scaled = {} if scale is None else {i: _times(g, scale) for i, g in zip(ctx.indices, ctx.saved_tensors)}
        return (None, None, None, *(scaled.get(i) for i in range(ctx.inputs)))


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return gradient × scale, multiplied in float32 or wider: a scale such as 1/901, rounded to bfloat16, would be
    wrong by the same factor for all elements. One row of one element, because a scalar would be rounded first."""
    wide = scale.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(1)
    return torch.mul(gradient, wide, out=torch.empty_like(gradient))


def _forward(job: TileJob, box: _Box, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results: list[Tensor] = []
    dtypes: list[torch.dtype] = []
    for start, stop in job.bounds:
        result = job.body(*job.tile(inputs, start, stop))
        box.several = isinstance(result, tuple)
        outputs = as_tuple(result)
        if len(job.bounds) == 1:
            return outputs
        if job.out == "sum":
            dtypes = [y.dtype for y in outputs]
            if not results:
                results = [y.to(torch.promote_types(y.dtype, torch.float32)) if job.wide else y for y in outputs]
            else:
                results = [a + b for a, b in zip(results, outputs)]
            continue
        if not results:
            total = job.bounds[-1][1]
            lead = job.lead or (total,)
            results = [torch.empty((*lead, *y.shape[1:]), dtype=y.dtype, device=y.device) for y in outputs]
        for result_rows, y in zip(results, outputs):
            result_rows.view(-1, *y.shape[1:])[start:stop].copy_(y)
        del result, outputs
    return tuple(y.to(dtype) for y, dtype in zip(results, dtypes)) if dtypes else tuple(results)


def _leaves(tile: list[Tensor], sums: dict[int, Gradient]) -> None:
    """Replace inputs whose gradient is needed by leaves of this tile's graph."""
    for i in sums:
        tile[i] = tile[i].detach().requires_grad_()


def _take(
    sums: dict[int, Gradient], outputs: list[Tensor], incoming: list[Tensor], tile: list[Tensor], start: int, stop: int
) -> None:
    leaves = [tile[i] for i in sums]
    values: Sequence[Tensor | None] = [None] * len(leaves)
    if outputs and leaves:
        values = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)
    for gradient, value in zip(sums.values(), values):
        gradient.add(value, start, stop)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Return what a body returns, a tensor or several, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


@contextmanager
def _as_tile() -> Iterator[None]:
    with torch.enable_grad(), _unseen(), recomputing("tile"):
        yield


def _unseen() -> Any:
    """Return hooks that hide the saved tensors of a tile from hooks around it: they are freed soon."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class Replay:
    """The surroundings of a forward. `again()` restores them, and leaves the random states as they were before."""

    def __init__(self, device: torch.device):
        self.device = device
        kinds = dict.fromkeys(("cpu", device.type)) if device.type != "meta" else {}
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self.random = self._states()

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Cast as the forward did, without a cache: each tile has new aliases, whose casts would accumulate."""
        with ExitStack() as stack:
            if any(enabled for _, enabled, _ in self.autocast):
                for kind, enabled, dtype in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        now = self._states()
        self._set(self.random)
        try:
            with self.casting():
                yield
        finally:
            self._set(now)

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)
