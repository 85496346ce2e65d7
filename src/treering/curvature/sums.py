"""A running sum of a aᵀ in floating point, and sums over ranks.

M inputs, E experts, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.errors import NumericsError
from treering.curvature.entry import Counts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (weight, shape of its moment, dtype, device) → what its inputs are added to: `add(rows, expert)`, `mean(name, groups)`
NewSum = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Any]


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A running sum in floating point: `total` M × M or E × M × M, `tokens` a count or E of them."""

    total: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, weight: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Sum":
        total = torch.zeros(shape, dtype=dtype, device=device)
        return cls(total=total, tokens=torch.zeros(shape[:-2], dtype=torch.int64))

    def copy(self) -> "Sum":
        return Sum(total=self.total.clone(), tokens=self.tokens.clone())

    @torch.no_grad()
    def add(self, rows: Tensor, expert: int | None = None) -> None:
        """Add the inputs of one matrix, T × M; of a stack, those of one expert."""
        total = self.total if expert is None else self.total[expert]
        wide = rows.to(total.dtype)
        total.addmm_(wide.mT, wide)  # in place: autocast leaves it alone
        (self.tokens if expert is None else self.tokens[expert]).add_(rows.shape[0])

    @torch.no_grad()
    def mean(self, name: str, groups: "Sequence[ProcessGroup]") -> tuple[Tensor, Counts]:
        """Return A in float32 on the host, and the tokens that it is the mean of; the sum is used up.

        An expert without tokens has A = 0. A collective over `groups`.
        """
        total = reduced(self.total, groups).cpu()
        tokens = reduced(self.tokens.to(self.total.device), groups).cpu()
        total /= tokens.clamp_min(1)[..., None, None]
        mean = ((total + total.mT) / 2).float().contiguous()  # a gemm may round the two halves differently
        if not bool(torch.isfinite(mean).all()):
            raise NumericsError(
                f"the inputs of {name} are not finite, or too large to be squared; does the model work in this dtype?"
            )
        return mean, int(tokens) if tokens.ndim == 0 else tuple(int(n) for n in tokens)


def reduced(
    value: Tensor, groups: "Sequence[ProcessGroup]", op: "dist.ReduceOp.RedOpType" = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce `value` in place over the ranks of each group in turn; by default sum it."""
    for group in groups:
        dist.all_reduce(value, op=op, group=group)
    return value
