"""Complement operators: what is protected of a weight, by measured inputs or by its own singular vectors.

    P = rest · (I − Q Qᵀ) + Q diag(values) Qᵀ        Q_Dk with orthonormal columns, 0 ≤ values, rest ≤ 1

rest 1, values 0: the span of Q is protected. rest 0, values 1: the span of Q alone is trainable. Values between protect
softly. In the form I − Q diag(d) Qᵀ: d = 1 − values, with rest 1. Experts have a leading dimension E.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from treering.anatomy.matrices import Matrix
from treering.techniques.osft.protection.decompose import eigen, finite, moment, svd
from treering.techniques.osft.protection.soft import soft_operator
from treering.techniques.osft.protection.targets import (
    OF_WEIGHTS,
    directions,
    floor,
    soft_everywhere,
    trainable,
    written_ratio,
)

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings

End = Literal["in", "out"]


@dataclass(frozen=True)
class Operator:
    """P, applied without being formed.

    Args:
        Q: […, D, k]
        values: […, k]
        rest: a number, or a tensor that broadcasts with `values`; [1] for a matrix, [E, 1] for a stack.
        multiply: two matrices; `product` where protection is soft, or does not depend on the result.
    """

    Q: Tensor
    values: Tensor
    rest: float | Tensor
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    def right(self, X: Tensor) -> Tensor:
        """Return X P, for X […, c, D]."""
        inside = self.multiply(X, self.Q) * self._weights()[..., None, :]
        return self._combine(X, self.multiply(inside, self.Q.mT))

    def inside(self, X: Tensor) -> Tensor:
        """Return X P Q: where rest is 0, all of X P, in k coordinates."""
        return self.multiply(X, self.Q) * self.values[..., None, :]

    def left(self, X: Tensor) -> Tensor:
        """Return P X, for X […, D, c]."""
        return self.combine(X, self.coefficients(X))

    def coefficients(self, X: Tensor) -> Tensor:
        """Return Qᵀ X. Where rows of Q and X are sharded, the sum over ranks is that of the complete matrices."""
        return self.multiply(self.Q.mT, X)

    def combine(self, X: Tensor, coefficients: Tensor) -> Tensor:
        """Return P X from X and its coefficients; needs no other rank's rows of Q and X."""
        return self._combine(X, self.multiply(self.Q, self._weights()[..., :, None] * coefficients))

    def matrix(self) -> Tensor:
        """Return P itself, D × D."""
        identity = torch.eye(self.Q.shape[-2], dtype=self.Q.dtype, device=self.Q.device)
        return self.left(identity.expand(*self.Q.shape[:-2], *identity.shape))

    def _weights(self) -> Tensor:
        return self.values - self.rest

    def _combine(self, X: Tensor, inside: Tensor) -> Tensor:
        if isinstance(self.rest, float):  # 0 and 1, which need neither a scale nor a copy
            return inside if self.rest == 0 else inside.add_(X, alpha=self.rest)
        return X * self.rest[..., None] + inside


# --- the shapes of operators, before any weight is read


@dataclass(frozen=True, kw_only=True)
class OperatorShape:
    """One operator of a weight: Q is size × columns.

    Attributes:
        end: the end of the weight on which it acts.
        thin: Q spans all that is trainable; else Q spans what is protected, and the rest is trainable.
        source: what the directions are computed from.
        inverse: P is computed without its directions.
    """

    end: End
    size: int
    columns: int
    thin: bool
    source: Literal["inputs", "weights"]
    soft: bool = False
    inverse: bool = field(default=False, repr=False)  # see `identity`

    @property
    def stored_as_matrix(self) -> bool:
        """Whether P itself is stored: multiplying with it costs less than multiplying with Q twice."""
        return 2 * self.columns > self.size

    @property
    def rest(self) -> float:
        return 0.0 if self.thin else 1.0


def operator_shapes(config: "OSFTSettings", matrix: Matrix) -> tuple[OperatorShape, ...]:
    """Return the operators that project a complete weight, each written in the way that has the smaller Q."""
    shapes = []
    if config.protect != "inputs":
        number = trainable_by_weights(config, matrix)
        ends: tuple[End, ...] = ("out",) if config.protect == "both" else ("out", "in")
        for end in ends:
            # Only on an end as long as the rank do the trainable singular vectors span all that is trainable.
            complete = _size(matrix, end) == matrix.rank
            shapes.append(_by_weights(matrix, end, number, thin=complete and number < matrix.rank - number))
    if config.protect != "weights":
        number = matrix.inputs if (every := soft_everywhere(config, matrix)) else trainable(config, matrix)
        thin = every or (config.strength == "hard" and number < matrix.inputs - number)
        shape = _by_inputs(config, matrix, number, thin=thin)
        # Where rows of the stored weight are inputs, P would have to be multiplied from the left, across ranks.
        shapes.append(replace(shape, inverse=every and not matrix.transposed))
    return tuple(shape for shape in shapes if shape.thin or shape.columns)


def adapter_shapes(config: "OSFTSettings", matrix: Matrix) -> dict[End, OperatorShape]:
    """Return the operators around an adapter: a basis on one end or on both, so that the trained tensor is small; on
    the other end an operator."""
    shapes = []
    by_weights, by_inputs = trainable_by_weights(config, matrix), trainable(config, matrix)
    core, short = config.chosen_form == "core", "out" if matrix.outputs <= matrix.inputs else "in"
    if config.protect == "inputs":
        shapes.append(_by_inputs(config, matrix, by_inputs, thin=True))
    elif config.protect == "weights" and by_weights < matrix.rank:
        shapes.append(_by_weights(matrix, "out", by_weights, thin=core or short == "out"))
        shapes.append(_by_weights(matrix, "in", by_weights, thin=core or short == "in"))
    elif config.protect == "both":
        shapes.append(_by_weights(matrix, "out", by_weights, thin=core or short == "out"))
        shapes.append(_by_inputs(config, matrix, by_inputs, thin=core or short == "in"))
    return {shape.end: shape for shape in shapes if shape.thin or shape.columns}


def trainable_by_weights(config: "OSFTSettings", matrix: Matrix) -> int:
    """Return the number of trainable singular directions. Under `both` the number that the user wrote counts inputs,
    and is taken in proportion."""
    if config.protect == "both" and written_ratio(config, matrix) is None and matrix.weight not in config.free:
        return max(1, floor(OF_WEIGHTS, matrix.rank))
    # At least one: a weight without a trainable direction is not trained at all.
    return min(matrix.rank, max(1, trainable(config, matrix) * matrix.rank // directions(config, matrix)))


def _size(matrix: Matrix, end: End) -> int:
    return matrix.outputs if end == "out" else matrix.inputs


def _by_weights(matrix: Matrix, end: End, number: int, *, thin: bool) -> OperatorShape:
    columns = number if thin else matrix.rank - number
    return OperatorShape(end=end, size=_size(matrix, end), columns=columns, thin=thin, source="weights")


def _by_inputs(config: "OSFTSettings", matrix: Matrix, number: int, *, thin: bool) -> OperatorShape:
    columns, soft = number if thin else matrix.inputs - number, config.strength == "soft"
    return OperatorShape(end="in", size=matrix.inputs, columns=columns, thin=thin, source="inputs", soft=soft)


# --- their values

Bases = Mapping[End, tuple[Tensor, Tensor] | Tensor]  # (Q, values) by end, or P


def bases(
    shapes: Sequence[OperatorShape],
    matrix: Matrix,
    damping: float,
    weight: Callable[[], Tensor],
    statistics: Mapping[str, Tensor] | None,
) -> Bases:
    """Return (Q, values) of each operator. `weight` is read only if its singular vectors are needed."""
    result: dict[End, tuple[Tensor, Tensor] | Tensor] = {}
    factors = None
    for shape in shapes:
        if shape.inverse:
            result[shape.end] = soft_operator(moment(matrix, statistics), damping)
            continue
        if shape.source == "inputs":
            result[shape.end] = from_inputs(shape, damping, moment(matrix, statistics))
            continue
        factors = factors or svd(matrix.oriented(finite(weight(), matrix)))
        Q = _columns(shape, factors[0] if shape.end == "out" else factors[2])
        result[shape.end] = Q, torch.full(Q.shape[:-2] + Q.shape[-1:], 1.0 - shape.rest, dtype=Q.dtype)
    return result


def from_inputs(shape: OperatorShape, damping: float, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of measured inputs, most used first, and their values.

    Soft: a value is 1 / (e/ē + λ) with e the direction's energy, relative to that of the most trainable directions.
    """
    energy, basis = eigen(A)
    Q, used = _columns(shape, basis), _columns(shape, energy[..., None, :])[..., 0, :]
    mean = energy.mean(-1, keepdim=True)
    values = torch.full_like(used, 1.0 - shape.rest)
    if shape.soft:
        others = energy[..., shape.columns :]
        last = used[..., -1:] if shape.thin or not others.shape[-1] else others.mean(-1, keepdim=True)
        unit = torch.where(mean > 0, mean, torch.ones_like(mean))
        values = ((last / unit + damping) / (used / unit + damping)).clamp(max=1.0)
    # Where nothing was measured (an expert that saw no token) nothing is protected.
    return Q, torch.where(mean > 0, values, torch.ones_like(values))


def _columns(shape: OperatorShape, basis: Tensor) -> Tensor:
    """Return the trainable directions, the last ones, where a spectrum is least; or the protected ones, the first."""
    return basis[..., basis.shape[-1] - shape.columns :] if shape.thin else basis[..., : shape.columns]


def scale(shapes: Sequence[OperatorShape], values_of: Bases, matrix: Matrix, frozen: Tensor | None = None) -> Tensor:
    """Return c = 1 / root mean square eigenvalue, [1] or [E]; 0 for matrices that are `frozen`.

    A step that points everywhere alike keeps its length.
    """
    result = torch.ones(matrix.experts or 1, dtype=torch.float64)
    for shape in shapes:
        if isinstance(basis := values_of[shape.end], Tensor):
            square = basis.double().square().sum((-2, -1))
        else:
            square = basis[1].double().square().sum(-1) + (shape.size - shape.columns) * shape.rest**2
        result = result * (square / shape.size).clamp_min(1e-30).rsqrt()
    return result if frozen is None else result.masked_fill(frozen, 0.0)


def cost(shapes: Sequence[OperatorShape], matrix: Matrix) -> float:
    """Return the multiplications of what `bases` decomposes, in proportion."""
    # An inverse from Cholesky factors takes about a quarter of the time of eigenvectors.
    work = {shape: 0.25 if shape.inverse else 1.0 for shape in shapes if shape.source == "inputs"}
    one = sum(share * float(shape.size) ** 3 for shape, share in work.items())
    if any(shape.source == "weights" for shape in shapes):
        one += float(matrix.rank * matrix.outputs * matrix.inputs)
    return one * (matrix.experts or 1)


def identity(config: "OSFTSettings", shapes: Sequence[OperatorShape]) -> str:
    """Return what the bases depend on besides the weight and the statistics.

    Prepared results are found by this text, so it keeps the name that the class had when the first were written.
    """
    text = repr(tuple(shapes)).replace(f"{OperatorShape.__name__}(", "Side(")
    inverse = " inverse" if any(shape.inverse for shape in shapes) else ""
    freeze = " freeze" if config.unmeasured == "freeze" else ""
    return f"osft {config.chosen_form} soften {config.damping} {text}{inverse}{freeze}"
