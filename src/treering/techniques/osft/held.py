"""Bases that no forward reads: buffers, dealt over ranks as the parameters are, and outside of FSDP's gathers.

A frozen parameter inside an FSDP unit would be gathered for every forward and backward. These are looked at twice a
step. Row for row they lie with the parameter they belong to, so that one end of it needs no message at all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from treering.core.full_precision import exactly
from treering.core.sharded import local, sum_over_rows
from treering.core.topology import parameter_mesh
from treering.techniques.osft.operator import Operator
from treering.techniques.osft.protection import End, Made, Side
from treering.techniques.osft.targets import Target

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Held(nn.Module):
    """The operators of one weight, each by the end of the weight on which it acts."""

    def __init__(
        self,
        target: Target,
        sides: Sequence[Side],
        dtype: torch.dtype,
        mesh: "DeviceMesh | None",
        *,
        anchored: bool,
        freezes: bool = False,
    ):
        super().__init__()
        self.target, self.freezes = target, freezes  # freezes: a matrix of scale 0 does not learn, and has no gradient
        self.sides = {side.end: side for side in sides}
        self.hard = not any(side.soft for side in sides)
        # Rows of the stored weight are dealt over ranks; experts are whole matrices, dealt one by one.
        self.rows: End = "in" if target.transposed else "out"
        self.columns: End = "out" if target.transposed else "in"
        stacked = target.experts is not None
        lead = (target.experts,) if target.experts is not None else ()
        for side in sides:
            if side.end == self.columns and side.whole:
                self._buffer(f"P_{side.end}", (*lead, side.size, side.size), dtype, mesh)
                continue
            self._buffer(f"Q_{side.end}", (*lead, side.size, side.columns), dtype, mesh)
            self._buffer(f"values_{side.end}", (*lead, side.columns), dtype, mesh if stacked else None)
        self._buffer("scale", lead or (1,), dtype, mesh if stacked else None)
        if anchored:
            self._buffer("before", target.shape, dtype, mesh)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, mesh: "DeviceMesh | None") -> None:
        self.register_buffer(name, dealt(shape, dtype, mesh))

    def project(self, X: Tensor, weight: Tensor, columns: Tensor | None) -> Tensor:
        """P_out X P_in of this rank's part `X` of a tensor that lies as `weight` does, and the whole `columns` of what
        is held at that end (see `fetch`). A collective where coefficients are summed over rows."""
        bases = {self.columns: columns}
        if self.rows in self.sides:  # the rows of Q that lie with this rank's rows of the weight
            bases[self.rows] = local(self.held(self.basis(self.rows)))
        return self._multiply(X, bases, lambda c: c if X.ndim == 3 else sum_over_rows(c, weight))

    def project_whole(self, X: Tensor, bases: Mapping[End, Tensor]) -> Tensor:
        """P_out X P_in where all rows of everything are here."""
        return self._multiply(X, bases, lambda c: c)

    def fetch(self) -> Callable[[], Tensor | None]:
        """What is held of the columns, of all ranks: on its way from here on, and waited for by the call."""
        return gathering(self.held(self.basis(self.columns))) if self.columns in self.sides else lambda: None

    def _multiply(self, X: Tensor, bases: Mapping[End, Tensor | None], together: Callable[[Tensor], Tensor]) -> Tensor:
        columns, rows = (self._operator(end, bases.get(end)) for end in (self.columns, self.rows))
        thin = isinstance(columns, Operator) and columns.rest == 0
        with exactly():
            if isinstance(columns, Operator):
                X = columns.inside(X) if thin else columns.right(X)
            elif columns is not None:
                X = X @ columns
            if isinstance(rows, Operator):
                X = rows.combine(X, together(rows.coefficients(X)))
            X = X @ columns.Q.mT if isinstance(columns, Operator) and thin else X
        if not self.freezes:
            return X
        learns = local(self.held("scale")).to(X.device) != 0
        return X * (learns[:, None, None] if X.ndim == 3 else learns)

    def stretch(self, X: Tensor) -> Tensor:
        """c X, in place."""
        scale = local(self.held("scale")).to(X.device)
        return X.mul_(scale[:, None, None] if X.ndim == 3 else scale)

    def basis(self, end: End) -> str:
        """The buffer that says what is held at this end: Q, or P itself where that is what is kept."""
        return f"P_{end}" if f"P_{end}" in self._buffers else f"Q_{end}"

    def _operator(self, end: End, basis: Tensor | None) -> Operator | Tensor | None:
        if basis is None or self.basis(end) == f"P_{end}":
            return basis
        return Operator(basis, local(self.held(f"values_{end}")), self.sides[end].rest)

    @property
    def cost(self) -> int:
        """Multiplications of projecting the whole matrix."""
        each = sum(s.size if self.basis(s.end) == f"P_{s.end}" else 2 * s.columns for s in self.sides.values())
        return each * self.target.outputs * self.target.inputs

    def values(self, own: str, made: Made) -> dict[str, Tensor]:
        """The buffers' first values, by live name, of what was decomposed."""
        found = {}
        for end, (Q, values) in made.items():
            if f"P_{end}" in self._buffers:
                found[f"{own}.P_{end}"] = Operator(Q, values, self.sides[end].rest).matrix()
            else:
                found |= {f"{own}.Q_{end}": Q, f"{own}.values_{end}": values}
        return found

    def held(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found


class Pair(NamedTuple):
    """`X` is this rank's part of a tensor that lies as `weight` does; it is projected in place."""

    held: Held
    X: Tensor
    weight: Tensor


def dealt(shape: tuple[int, ...], dtype: torch.dtype, mesh: "DeviceMesh | None") -> Tensor:
    """A tensor without values, in rows over the mesh as `fully_shard` deals a parameter."""
    if mesh is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    over = parameter_mesh(mesh)
    each = -(-shape[0] // over.size(over.ndim - 1))
    start = min(each * over.get_local_rank(over.ndim - 1), shape[0])
    own = torch.empty((min(each, shape[0] - start), *shape[1:]), dtype=dtype, device="meta")
    placements = [*[Replicate()] * (over.ndim - 1), ShardPlacement(0)]
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, over, placements, run_check=False, shape=torch.Size(shape), stride=strides)


def gathering(value: Tensor) -> Callable[[], Tensor]:
    """Rows of all ranks, asked for now and waited for by the call; a stack of experts stays with its rank, where its
    weights are."""
    if not isinstance(value, DTensor) or value.ndim != 2:
        return lambda: local(value)
    moving = value.redistribute(placements=[Replicate()] * value.device_mesh.ndim, async_op=True).to_local()
    return lambda: moving.wait() if isinstance(moving, AsyncCollectiveTensor) else moving


@torch.no_grad()
def project_all(pairs: Iterable[Pair]) -> None:
    """Each X becomes P_out X P_in. A collective: what the next one needs travels while this one is multiplied."""
    queue = list(pairs)
    ahead = [pair.held.fetch() for pair in queue[:1]]
    for i, (held, X, weight) in enumerate(queue):
        columns = ahead.pop()()
        ahead += [pair.held.fetch() for pair in queue[i + 1 : i + 2]]
        # With offload the weight rests on the host and the bases do not: they would be the larger thing to move.
        X.copy_(held.project(X.to(held.held("scale").device), weight, columns))
        del columns  # or it would still be there while the one after the next is fetched
