"""The operators of form `update`: buffers, sharded as the parameters are, and outside of what FSDP gathers.

A frozen parameter inside an FSDP unit would be gathered for every forward and backward; operators are needed twice a
step. Their rows are on the ranks that hold the same rows of the weight, so that one end of it needs no message.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import Matrix
from treering.core.full_precision import full_precision, product
from treering.core.sharded import TensorCache, gather, local, meta_rows, start_gather, sum_over_rows
from treering.technique import TrainedMatrix
from treering.techniques.osft.protection.operators import Bases, End, Operator, OperatorShape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class OperatorBuffers(nn.Module):
    """The operators of one weight, each by the end of the weight on which it acts.

    Buffers: for each end Q and values, or P itself where that costs less; `scale`; with `keep_initial` the weight as it
    was `before` training.

    Args:
        freezes: a matrix of scale 0 does not learn, and its gradient is set to 0.
    """

    def __init__(
        self,
        matrix: Matrix,
        shapes: Sequence[OperatorShape],
        dtype: torch.dtype,
        mesh: "DeviceMesh | None",
        *,
        keep_initial: bool,
        freezes: bool = False,
    ):
        super().__init__()
        self.matrix, self.freezes = matrix, freezes
        self._complete: dict[End, TensorCache] = {}
        self.shapes = {shape.end: shape for shape in shapes}
        self.hard = not any(shape.soft for shape in shapes)
        # A soft operator lets more through than such a product rounds away; a hard one nothing.
        self.multiply = torch.matmul if self.hard else product
        # Rows of the stored weight are sharded; of experts, complete matrices.
        self.rows: End = "in" if matrix.transposed else "out"
        self.columns: End = "out" if matrix.transposed else "in"
        of_experts = mesh if matrix.lead else None
        for shape in shapes:
            if shape.end == self.columns and shape.stored_as_matrix:
                self._add(f"P_{shape.end}", (*matrix.lead, shape.size, shape.size), dtype, mesh)
                continue
            self._add(f"Q_{shape.end}", (*matrix.lead, shape.size, shape.columns), dtype, mesh)
            self._add(f"values_{shape.end}", (*matrix.lead, shape.columns), dtype, of_experts)
        self._add("scale", matrix.lead or (1,), dtype, of_experts)
        if keep_initial:
            self._add("before", matrix.shape, dtype, mesh)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, mesh: "DeviceMesh | None") -> None:
        self.register_buffer(name, meta_rows(shape, dtype, mesh, experts=bool(self.matrix.lead)))

    def buffer(self, name: str) -> Tensor:
        """Return the buffer `name` as it is stored, sharded or not."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def basis(self, end: End) -> str:
        """Return the name of the buffer for this end: Q, or P itself where that is stored."""
        return f"P_{end}" if f"P_{end}" in self._buffers else f"Q_{end}"

    def values(self, prefix: str, bases: Bases) -> dict[str, Tensor]:
        """Return the buffers' first values by live name, from (Q, values) of each end."""
        tensors = {}
        for end, (Q, values) in bases.items():
            if f"P_{end}" in self._buffers:
                tensors[f"{prefix}.P_{end}"] = Operator(Q, values, self.shapes[end].rest).matrix()
            else:
                tensors |= {f"{prefix}.Q_{end}": Q, f"{prefix}.values_{end}": values}
        return tensors

    @property
    def cost(self) -> int:
        """Return the multiplications of projecting the complete matrix."""
        each = sum(s.size if self.basis(s.end) == f"P_{s.end}" else 2 * s.columns for s in self.shapes.values())
        return each * self.matrix.outputs * self.matrix.inputs

    def fetch(self) -> Callable[[], Tensor | None]:
        """Start to gather the operator that acts on columns; the returned function waits for it. Experts' operators are
        on the ranks that hold the experts, and are not gathered."""
        if self.columns not in self.shapes:
            return lambda: None
        basis = self.buffer(self.basis(self.columns))
        return start_gather(local(basis) if self.matrix.lead else basis)

    def project(self, X: Tensor, weight: Tensor, columns: Tensor | None) -> Tensor:
        """Return P_out X P_in of this rank's rows `X` of a tensor that is sharded as `weight` is.

        `columns` comes from `fetch`. A collective where coefficients are summed over rows.
        """
        bases = {self.columns: columns}
        if self.rows in self.shapes:  # the rows of Q that belong to this rank's rows of the weight
            bases[self.rows] = local(self.buffer(self.basis(self.rows)))
        return self._multiply(X, bases, lambda c: c if X.ndim == 3 else sum_over_rows(c, weight))

    def project_complete(self, X: Tensor, bases: Mapping[End, Tensor]) -> Tensor:
        """Return P_out X P_in where this rank has all rows of X and of both operators."""
        return self._multiply(X, bases, lambda c: c)

    def seen(self, end: End, expert: int | None, rows: Tensor) -> Tensor:
        """Return rows · P of inputs (`in`) or output gradients (`out`), one token a row: what the projected gradient is
        made of. A collective the first time, where operators are sharded; they are kept complete from then on."""
        buffers = [name for name in (self.basis(end), f"values_{end}", "scale") if name in self._buffers]
        cache = self._complete.setdefault(end, TensorCache())
        if not cache.valid(*map(self.buffer, buffers)):
            cache.keep({name: gather(self.buffer(name)) for name in buffers}, *map(self.buffer, buffers))
        tensors = {name: t if expert is None else t[expert] for name, t in cache.value.items()}
        X = rows.to(tensors["scale"].dtype)
        with full_precision():
            if end in self.shapes and f"P_{end}" in tensors:
                X = self.multiply(X, tensors[f"P_{end}"])
            elif end in self.shapes:
                X = Operator(tensors[f"Q_{end}"], tensors[f"values_{end}"], self.shapes[end].rest, self.multiply).right(
                    X
                )
        return X * (tensors["scale"] != 0) if self.freezes else X

    def trained(self) -> tuple[TrainedMatrix, ...]:
        """Return where the inputs and output gradients of the projected gradient are seen."""
        return tuple(
            TrainedMatrix(
                name=self.matrix.weight,
                module=self.matrix.module,
                expert=one.expert,
                inputs=partial(self.seen, "in", one.expert) if "in" in self.shapes else None,
                outputs=partial(self.seen, "out", one.expert) if "out" in self.shapes or self.freezes else None,
                transposed=self.matrix.transposed,
            )
            for one in self.matrix.each()
        )

    def stretch(self, X: Tensor) -> Tensor:
        """Multiply this rank's rows X by c in place."""
        scale = local(self.buffer("scale")).to(X.device)
        return X.mul_(scale[:, None, None] if X.ndim == 3 else scale)

    def _multiply(self, X: Tensor, bases: Mapping[End, Tensor | None], sum_rows: Callable[[Tensor], Tensor]) -> Tensor:
        columns, rows = (self._operator(end, bases.get(end)) for end in (self.columns, self.rows))
        thin = isinstance(columns, Operator) and columns.rest == 0
        with full_precision():
            if isinstance(columns, Operator):
                X = columns.inside(X) if thin else columns.right(X)
            elif columns is not None:
                X = self.multiply(X, columns)
            if isinstance(rows, Operator):
                X = rows.combine(X, sum_rows(rows.coefficients(X)))
            X = self.multiply(X, columns.Q.mT) if isinstance(columns, Operator) and thin else X
        if not self.freezes:
            return X
        learns = local(self.buffer("scale")).to(X.device) != 0
        return X * (learns[:, None, None] if X.ndim == 3 else learns)

    def _operator(self, end: End, basis: Tensor | None) -> Operator | Tensor | None:
        if basis is None or self.basis(end) == f"P_{end}":
            return basis
        return Operator(basis, local(self.buffer(f"values_{end}")), self.shapes[end].rest, self.multiply)


class ProjectedRows(NamedTuple):
    """`X`, this rank's rows of a tensor that is sharded as `weight` is, and the operators that project it in place."""

    operators: OperatorBuffers
    X: Tensor
    weight: Tensor


@torch.no_grad()
def project_all(tasks: Iterable[ProjectedRows]) -> None:
    """Replace each X by P_out X P_in. A collective: the next operator is gathered while this one is multiplied."""
    queue = list(tasks)
    ahead = [task.operators.fetch() for task in queue[:1]]
    for i, (operators, X, weight) in enumerate(queue):
        columns = ahead.pop()()
        ahead += [task.operators.fetch() for task in queue[i + 1 : i + 2]]
        # With offload the weight is on the host and the operators are not: they would be the larger thing to copy.
        X.copy_(operators.project(X.to(operators.buffer("scale").device), weight, columns))
        del columns  # or it would still be in memory while the one after the next is gathered
