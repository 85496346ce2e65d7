"""Pairs: the inputs and output gradients of one weight, and the identity that sees them in the backward.

R rows that reach a layer, M inputs, N outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.curvature.batch_tokens import BatchTokens, LayerRows
from treering.technique import TileRows, recompute_state, tile_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """What the gradient of one weight is made of, for some rows: all of a batch, or those of a tile.

    Attributes:
        weight: the plain parameter.
        a_RM, g_RN: inputs, and gradients of the outputs, of the rows.
        rows: of which tokens they are.
        experts: [R] the expert of each row, ascending, of a stack; None: the weight is one matrix.
        batch: the tokens of the batch.
        source_RM: the inputs without what was appended to them, which show whose are the same; None: a_RM.
    """

    weight: str
    a_RM: Tensor
    g_RN: Tensor
    rows: LayerRows
    experts: Tensor | None
    batch: BatchTokens
    source_RM: Tensor | None = None


class PairSink(Protocol):
    """What is given the pairs, in the backward."""

    def take(self, pair: Pair) -> None: ...


RowsOfCall = Callable[[BatchTokens, TileRows | None], LayerRows]
Made = Callable[[Tensor, Tensor], Sequence[tuple[str, Tensor, Tensor]]]  # (x, gradient of y) -> (weight, a_RM, g_RN)


class Capture:
    """Yielded by `capture`. Before each forward, `batch` is set to the tokens that the forward computes.

    Attributes:
        begins: an output that needs no gradient begins the graph. What lies before the first layers that are seen needs
            no backward then.
    """

    def __init__(self, sink: PairSink):
        self.sink, self.begins = sink, False
        self.batch: BatchTokens | None = None

    def __reduce__(self) -> Any:
        """Refuse to be copied, as an observer does."""
        raise PlanError("the gradients of the model are being observed; copy the model before or afterwards")

    def see(self, weight: str, x: Tensor, y: Tensor, rows: RowsOfCall, experts: Tensor | None = None) -> Tensor:
        """Return y, the product of x with `weight`, through which the gradient of `weight` will be seen."""
        return self.see_made(lambda a, g: [(weight, flat(a.detach()), flat(g.detach()))], x, y, rows, experts)

    def see_made(self, made: Made, x: Tensor, y: Tensor, rows: RowsOfCall, experts: Tensor | None = None) -> Tensor:
        """Return y, through which the gradients of weights will be seen; `made` gives their pairs from x and that of y.

        All pairs have the same rows.
        """
        if self.batch is None or not torch.is_grad_enabled() or recompute_state() == "teacher":
            return y
        if not y.requires_grad:
            if not self.begins:
                return y
            y = y.detach().requires_grad_()
        batch, tile = self.batch, tile_rows()

        def take(x: Tensor, gradient: Tensor) -> None:
            known = rows(batch, tile)
            for weight, a, g in made(x, gradient):
                self.sink.take(Pair(weight=weight, a_RM=a, g_RN=g, rows=known, experts=experts, batch=batch))

        return _See.apply(y, x, take)


def flat(x: Tensor) -> Tensor:
    """Return the rows of x."""
    return x.reshape(-1, x.shape[-1])


class _See(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        [x] = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            ctx.take(x, g)
        return g, None, None
