"""The operators of form `update`: buffers, sharded as the parameters are, and outside of what FSDP gathers.

A frozen parameter inside an FSDP unit would be gathered for every forward and backward; operators are needed twice a
step. Their rows are on the ranks that hold the same rows of the weight, so that one end of it needs no message.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import Matrix
from treering.core.full_precision import full_precision, product, rounded_product
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
        precision: of soft protection of every direction.
        freezes: a matrix of scale 0 does not learn, and its gradient is set to 0.
        shared: operators of another weight that reads the same inputs. They are this weight's as well.
    """

    def __init__(
        self,
        matrix: Matrix,
        shapes: Sequence[OperatorShape],
        dtype: torch.dtype,
        mesh: "DeviceMesh | None",
        *,
        keep_initial: bool,
        precision: torch.dtype | None = None,
        freezes: bool = False,
        shared: "OperatorBuffers | None" = None,
    ):
        super().__init__()
        self.matrix, self.freezes = matrix, freezes
        self._shared = () if shared is None else (shared,)  # in a tuple, or it would be registered as a child
        self._complete: dict[str, TensorCache] = {}
        self.shapes = {shape.end: shape for shape in shapes}
        self.hard = not any(shape.soft for shape in shapes)
        # Rows of the stored weight are sharded; of experts, complete matrices.
        self.rows: End = "in" if matrix.transposed else "out"
        self.columns: End = "out" if matrix.transposed else "in"
        if shared is None:
            self._add_operators(shapes, dtype, mesh, precision if dtype == torch.float32 else None)
        if keep_initial:
            self._add("before", matrix.shape, dtype, mesh)

    def _add_operators(
        self,
        shapes: Sequence[OperatorShape],
        dtype: torch.dtype,
        mesh: "DeviceMesh | None",
        precision: torch.dtype | None,
    ) -> None:
        lead, of_experts = self.matrix.lead, mesh if self.matrix.lead else None
        for shape in shapes:
            # A rounded Q would multiply from both sides of X, and so round X itself.
            stored = precision if precision and shape.inverse else dtype
            if shape.end == self.columns and shape.stored_as_matrix:
                self._add(f"P_{shape.end}", (*lead, shape.size, shape.size), stored, mesh)
                continue
            self._add(f"Q_{shape.end}", (*lead, shape.size, shape.columns), stored, mesh)
            self._add(f"values_{shape.end}", (*lead, shape.columns), dtype, of_experts)
        self._add("scale", lead or (1,), dtype, of_experts)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, mesh: "DeviceMesh | None") -> None:
        self.register_buffer(name, meta_rows(shape, dtype, mesh, experts=bool(self.matrix.lead)))

    @property
    def source(self) -> "OperatorBuffers":
        """The operators of the weight that stores them: this one, or one that reads the same inputs."""
        return self._shared[0] if self._shared else self

    def has(self, name: str) -> bool:
        """Return whether there is a buffer `name`, of this weight or shared."""
        return name in self._buffers or name in self.source._buffers

    def buffer(self, name: str) -> Tensor:
        """Return the buffer `name` as it is stored, sharded or not."""
        buffer = self._buffers[name] if name in self._buffers else self.source._buffers[name]
        assert buffer is not None
        return buffer

    def basis(self, end: End) -> str:
        """Return the name of the buffer for this end: Q, or P itself where that is stored."""
        return f"P_{end}" if self.has(f"P_{end}") else f"Q_{end}"

    def values(self, prefix: str, bases: Bases) -> dict[str, Tensor]:
        """Return the buffers' first values by live name, from (Q, values) of each end."""
        tensors = {}
        for end, basis in bases.items():
            if isinstance(basis, Tensor):
                tensors[f"{prefix}.P_{end}"] = basis
            elif self.has(f"P_{end}"):
                tensors[f"{prefix}.P_{end}"] = Operator(*basis, self.shapes[end].rest).matrix()
            else:
                tensors |= {f"{prefix}.Q_{end}": basis[0], f"{prefix}.values_{end}": basis[1]}
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

    def project_complete(self, X: Tensor, bases: Mapping[str, Tensor]) -> Tensor:
        """Return P_out X P_in where this rank has all rows of X and of the buffers `bases`, by name."""
        return self._multiply(X, {end: bases[self.basis(end)] for end in self.shapes}, lambda c: c)

    def seen(self, end: End, expert: int | None, rows: Tensor) -> Tensor:
        """Return rows · P of inputs (`in`) or output gradients (`out`), one token a row: what the projected gradient is
        made of. A collective the first time, where operators are sharded; they are kept complete from then on."""
        buffers = [name for name in (self.basis(end), f"values_{end}", "scale") if self.has(name)]
        cache = self.source._complete.setdefault(end, TensorCache())
        if not cache.valid(*map(self.buffer, buffers)):
            cache.keep({name: gather(self.buffer(name)) for name in buffers}, *map(self.buffer, buffers))
        tensors = {name: t if expert is None else t[expert] for name, t in cache.value.items()}
        X = rows.to(tensors["scale"].dtype)
        with full_precision():
            if end in self.shapes:
                X = self._right(X, end, tensors[self.basis(end)], tensors.get(f"values_{end}"))
        return X * (tensors["scale"] != 0) if self.freezes else X

    def _right(self, X: Tensor, end: End, basis: Tensor, values: Tensor | None) -> Tensor:
        if values is None:
            return self._product(basis)(X, basis)
        return Operator(basis, values, self.shapes[end].rest, self._product(basis)).right(X)

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
                X = self._product(columns)(X, columns)
            if isinstance(rows, Operator):
                X = rows.combine(X, sum_rows(rows.coefficients(X)))
            X = columns.multiply(X, columns.Q.mT) if isinstance(columns, Operator) and thin else X
        if not self.freezes:
            return X
        learns = local(self.buffer("scale")).to(X.device) != 0
        return X * (learns[:, None, None] if X.ndim == 3 else learns)

    def _operator(self, end: End, basis: Tensor | None) -> Operator | Tensor | None:
        if basis is None or self.basis(end) == f"P_{end}":
            return basis
        values = local(self.buffer(f"values_{end}"))
        return Operator(basis, values, self.shapes[end].rest, self._product(basis))

    def _product(self, basis: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return how to multiply with `basis`: a soft operator lets more through than `product` rounds away, a hard one
        nothing."""
        if basis.dtype == torch.bfloat16:
            return rounded_product
        return torch.matmul if self.hard else product


class ProjectedRows(NamedTuple):
    """`X`, this rank's rows of a tensor that is sharded as `weight` is, and the operators that project it in place."""

    operators: OperatorBuffers
    X: Tensor
    weight: Tensor


@torch.no_grad()
def project_all(tasks: Iterable[ProjectedRows]) -> None:
    """Replace each X by P_out X P_in. A collective: the next operator is gathered while this one is multiplied.

    Weights that share their operators follow each other, so that each operator is gathered once.
    """
    groups = [list(group) for _, group in groupby(tasks, key=lambda task: id(task.operators.source))]
    ahead = [group[0].operators.fetch() for group in groups[:1]]
    for i, group in enumerate(groups):
        columns = ahead.pop()()
        ahead += [later[0].operators.fetch() for later in groups[i + 1 : i + 2]]
        for operators, X, weight in group:
            # With offload the weight is on the host and the operators are not: they would be the larger thing to copy.
            X.copy_(operators.project(X.to(operators.buffer("scale").device), weight, columns))
        del columns  # or it would still be in memory while the one after the next is gathered
