"""Bases that no forward reads: buffers, dealt over ranks as the parameters are, and outside of FSDP's gathers.

A frozen parameter inside an FSDP unit would be gathered for every forward and backward. These are looked at twice a
step. Row for row they lie with the parameter they belong to, so that one end of it needs no message at all.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from treering.osft.operator import Operator
from treering.osft.protection import End, Made, Side
from treering.osft.targets import Target
from treering.topology import parameter_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Held(nn.Module):
    """The operators of one weight, each by the end of the weight on which it acts."""

    def __init__(
        self, target: Target, sides: Sequence[Side], dtype: torch.dtype, mesh: "DeviceMesh | None", *, anchored: bool
    ):
        super().__init__()
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

    def project(self, X: Tensor, weight: Tensor) -> Tensor:
        """P_out X P_in of this rank's part `X` of a tensor that lies as `weight` does. A collective."""
        columns, rows = self._whole(self.columns), self._own(self.rows)
        thin = isinstance(columns, Operator) and columns.rest == 0
        if isinstance(columns, Operator):
            X = columns.inside(X) if thin else columns.right(X)
        elif columns is not None:
            X = X @ columns
        if rows is not None:
            coefficients = rows.coefficients(X)
            X = rows.combine(X, coefficients if X.ndim == 3 else sum_over_rows(coefficients, weight))
        return X @ columns.Q.mT if isinstance(columns, Operator) and thin else X

    def stretch(self, X: Tensor) -> Tensor:
        """c X, in place."""
        scale = local(self.held("scale"))
        return X.mul_(scale[:, None, None] if X.ndim == 3 else scale)

    def _own(self, end: End) -> Operator | None:
        """As this rank holds it: the rows of Q that lie with its rows of the weight."""
        if end not in self.sides:
            return None
        return Operator(local(self.held(f"Q_{end}")), local(self.held(f"values_{end}")), self.sides[end].rest)

    def _whole(self, end: End) -> Operator | Tensor | None:
        """Gathered over ranks, where it is dealt by rows; P itself where that is what is kept."""
        if end not in self.sides:
            return None
        if f"P_{end}" in self._buffers:
            return gathered(self.held(f"P_{end}"))
        values = local(self.held(f"values_{end}"))
        return Operator(gathered(self.held(f"Q_{end}")), values, self.sides[end].rest)

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


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(value: Tensor) -> Tensor:
    """Rows of all ranks; a stack of experts stays with its rank, where its weights are."""
    return value.full_tensor() if isinstance(value, DTensor) and value.ndim == 2 else local(value)


def sum_over_rows(value: Tensor, like: Tensor) -> Tensor:
    """In place: the sum of what ranks that hold other rows of `like` have. Replicas have it already."""
    for axis, placement in enumerate(like.placements if isinstance(like, DTensor) else ()):
        if isinstance(placement, ShardPlacement):
            dist.all_reduce(value, group=like.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return value
