"""Sums of second moments that do not depend on the order of their terms, nor on how ranks share them.

Floating-point addition rounds, so the same terms give other bits in another order, and other bits are another digest:
another prepared folder, another index. Here each term is rounded once, to a grid of integers, and integers are added:
int64 sums are associative. The grid is fine (2⁻⁴⁴ of √(c_ii c_jj) for 64 batches) and has a step of its own for
each row and each column, because channels of a model differ by orders of magnitude.

    c_ij  ≈  n_ij · 2^(e_i + e_j − bits),   n_ij an integer

The exponents e come from the first batch of rank 0 (`share_peaks`), which is the same batch on any number of ranks.
Where a later batch is so much larger that a sum could overflow, the measurement is repeated with exponents that fit all
batches (`larger_steps`): they too depend on the data alone.

M width of the moment, E experts, T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.errors import NumericsError
from treering.curvature.entry import Counts
from treering.curvature.sums import reduced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_RANGE = 62  # bits of a sum, without its sign
_GROWTH = 12  # bits by which a later batch may be larger than the first one
_FLOOR = 40  # bits between the largest variance and the smallest that a step is chosen for
_UNSEEN = 20  # the same, for channels that were 0 in the first batch: what they will be is not known
_BLOCK = 1 << 22  # elements that are converted at a time


def bits_for(terms: int) -> int:
    """Return the bits of the grid below √(c_ii c_jj) where `terms` are added."""
    return _RANGE - _GROWTH - max(1, math.ceil(math.log2(max(2, terms))))


def exponents_of(variances_M: Tensor) -> Tensor:
    """Return e_M, int64, with variances ≤ 4^e: a channel that was not seen takes part in the range of the others."""
    largest = variances_M.max() if variances_M.numel() else variances_M.new_zeros(())
    if not 0 < float(largest) < math.inf:
        return torch.zeros(variances_M.shape, dtype=torch.int64)
    floored = variances_M.double().clamp_min(float(largest) * 2.0**-_FLOOR)
    floored = torch.where(variances_M > 0, floored, float(largest) * 2.0**-_UNSEEN)
    return torch.ceil(torch.log2(floored) / 2).long().cpu()


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The exponents of a sum: of its rows and its columns. The same for both where the terms are symmetric."""

    rows: Tensor  # int64, on the host
    columns: Tensor
    bits: int


@dataclass(kw_only=True)
class ExactSum:
    """Σ c over terms c as integers; see above.

    Terms are symmetric without negative eigenvalues, M × M, whose elements are no larger than √(c_ii c_jj); or, with
    `symmetric` false, N × M without negative elements. Of a stack there is one sum for each expert.

    Attributes:
        total: […, N, M] int64.
        tokens: how many, or one number for each expert.
        steps: None: nothing is added yet, only the peaks that steps are chosen from are kept.
    """

    BYTES: ClassVar[int] = 8  # of an element

    total: Tensor
    tokens: Tensor
    steps: Steps | None
    symmetric: bool = True
    terms: int = 0

    def __post_init__(self) -> None:
        device = self.total.device
        self.peaks = [torch.zeros(n, dtype=torch.float64, device=device) for n in self.total.shape[-2:]]
        if self.steps is not None:
            self._rows = torch.exp2(self.steps.bits - self.steps.rows.double()).to(device)[:, None]
            self._columns = torch.exp2(-self.steps.columns.double()).to(device)
        self.largest = torch.zeros((), dtype=torch.float64, device=device)  # integer so far, in float64

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], device: torch.device, steps: Steps | None, symmetric: bool = True
    ) -> "ExactSum":
        """Return the sum of no term, of terms that have the last two dimensions of `shape`."""
        total = torch.zeros((), dtype=torch.int64, device=device).expand(shape)
        if steps is not None:
            total = total.clone(memory_format=torch.contiguous_format)
        return cls(total=total, tokens=torch.zeros(shape[:-2], dtype=torch.int64), steps=steps, symmetric=symmetric)

    @torch.no_grad()
    def add(self, rows: Tensor, expert: int | None = None) -> None:
        """Add rowsᵀ rows of inputs T × M; of a stack, to the sum of one expert."""
        if self.steps is None:
            self._see(rows.double().square().sum(0))
            return
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        with torch.autocast(rows.device.type, enabled=False):
            self.add_term(wide.mT @ wide, rows.shape[0], expert)

    @torch.no_grad()
    def add_term(self, term: Tensor, tokens: int, expert: int | None = None) -> None:
        """Add a matrix, of so many tokens."""
        self._see(*([term.diagonal()] if self.symmetric else [term.amax(1), term.amax(0)]))
        self.terms += 1
        if self.steps is None:
            return
        total = self.total if expert is None else self.total[expert]
        height = max(1, _BLOCK // term.shape[1])
        for start in range(0, len(term), height):
            part = slice(start, start + height)
            grid = (term[part].double() * self._rows[part]).mul_(self._columns).round_()
            torch.maximum(self.largest, grid.abs().amax(), out=self.largest)
            total[part] += grid.long()
        (self.tokens if expert is None else self.tokens[expert]).add_(tokens)

    def _see(self, rows: Tensor, columns: Tensor | None = None) -> None:
        for peak, largest in zip(self.peaks, (rows, rows if columns is None else columns)):
            torch.maximum(peak, largest.double(), out=peak)

    def chosen(self, bits: int, *, safe: bool = False) -> Steps:
        """Return steps for terms like those so far: `safe` ones, that certainly fit these, or finer ones."""
        rows, columns = (peak.cpu() for peak in self.peaks)
        if not (safe or self.symmetric):
            # Where elements are products of a row's and a column's number, these steps fit small ones as well.
            largest = float(rows.max())
            rows, columns = (peak.square() / largest if largest > 0 else peak for peak in (rows, columns))
        return Steps(rows=exponents_of(rows), columns=exponents_of(columns), bits=bits)

    @torch.no_grad()
    def larger_steps(self, name: str, groups: "Sequence[ProcessGroup]") -> Steps | None:
        """Return the steps that fit what was added, where the present ones do not; else None. A collective."""
        assert self.steps is not None
        for i, peak in enumerate(self.peaks):
            self.peaks[i] = reduced(peak.nan_to_num(nan=math.inf, posinf=math.inf), groups, dist.ReduceOp.MAX)
            if not bool(torch.isfinite(self.peaks[i]).all()):
                raise NumericsError(
                    f"what reaches {name} is not finite, or too large to be squared; does the model work in this dtype?"
                )
        terms = max(1, int(reduced(torch.tensor(self.terms, device=self.total.device), groups)))
        largest = float(reduced(self.largest, groups, dist.ReduceOp.MAX))
        return None if largest * terms < 2.0**_RANGE else self.chosen(self.steps.bits, safe=True)

    @torch.no_grad()
    def sum(self, groups: "Sequence[ProcessGroup]") -> tuple[Tensor, Tensor]:
        """Return the sum in float64 on the host, and its tokens; it is used up. A collective over `groups`."""
        assert self.steps is not None
        total = reduced(self.total, groups).cpu().double()
        total *= torch.exp2(self.steps.rows.double() - self.steps.bits)[:, None]
        total *= torch.exp2(self.steps.columns.double())
        if self.symmetric:  # a gemm may round the two halves differently
            total = (total + total.mT) / 2
        return total, reduced(self.tokens.to(self.total.device), groups).cpu()

    def mean(self, name: str, groups: "Sequence[ProcessGroup]") -> tuple[Tensor, Counts]:
        """Return the mean in float32, and the tokens that it is of; the sum is used up. A collective."""
        total, tokens = self.sum(groups)
        mean = (total / tokens.clamp_min(1)[..., None, None]).float().contiguous()
        return mean, int(tokens) if tokens.ndim == 0 else tuple(int(n) for n in tokens)
