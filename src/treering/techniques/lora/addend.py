"""An adapter next to a linear layer or to a stack of experts: a small module, whose output is added to the base's.

    A_rM  rank × inputs        B_Nr  outputs × rank        with a leading dimension E for experts

A module of its own, because FSDP's unit of dtype is the module: adapters pinned to float32 inside a bfloat16 model
need a unit that does not cast them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.anatomy.matrices import Matrix
from treering.experts.products import low_rank
from treering.technique import TrainedMatrix


class Addend(nn.Module):
    """The adapter of a linear layer. A, B and their arithmetic have the dtype of the parameters."""

    def __init__(self, matrix: Matrix, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(*matrix.lead, rank, matrix.inputs, dtype=dtype, device="meta"))
        self.B = nn.Parameter(torch.empty(*matrix.lead, matrix.outputs, rank, dtype=dtype, device="meta"))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + scale · B A x. The scale is applied to the few numbers in between."""
        low = F.linear(x.to(self.A.dtype), self.A) * self.scale
        if y.dtype != self.B.dtype or y.ndim < 2:
            return y + F.linear(low, self.B).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.B.mT).view_as(y)

    def trained(self, prefix: str, matrix: Matrix) -> tuple[TrainedMatrix, ...]:
        """Return where the inputs and output gradients of A and B are seen; their live names begin with `prefix`."""
        return tuple(half for one in matrix.each() for half in self._halves(prefix, one))

    def _halves(self, prefix: str, one: Matrix) -> tuple[TrainedMatrix, TrainedMatrix]:
        expert = one.expert

        def factor(parameter: Tensor) -> Tensor:
            return parameter if expert is None else parameter[expert]

        return (
            TrainedMatrix(
                name=f"{prefix}.A",
                module=one.module,
                expert=expert,
                outputs=lambda g: g.to(self.B.dtype) @ factor(self.B) * self.scale,
            ),
            TrainedMatrix(
                name=f"{prefix}.B",
                module=one.module,
                expert=expert,
                inputs=lambda a: F.linear(a.to(self.A.dtype), factor(self.A)),
                outputs=lambda g: g.to(self.B.dtype) * self.scale,
            ),
        )


class ExpertAddend(Addend):
    """The adapters of a stack of experts: one pair A, B for each."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """Return scale · B A x for rows x [S, M] that are sorted by expert and end at `offsets`."""
        return low_rank(x, self.A, self.B, offsets, self.scale)
