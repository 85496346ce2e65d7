"""What turns the gradient G [N outputs, M inputs] of one matrix into the numbers of a row of an index.

Every map is linear, and acts on the two sides of G = Σ_t g_t a_tᵀ apart, so that G is never formed:

    psift        (M_S G M_Aᵀ),  M = R H^(−½),  H = Q (E + c·mean E) Qᵀ of the side          [p_S, p_A]
    eigen-topk   (Q_Sᵀ G Q_A) ⊙ (Λ + c·mean Λ)^(−½),  Λ = E_S E_Aᵀ unless corrected         [N, M], or [block, block]
    exact        G; of a query Q_S [(Q_Sᵀ G Q_A) ⊘ (Λ + c·mean Λ)] Q_Aᵀ                      [N, M]

A and S are the second moments of inputs a and gradients g, Q their eigenvectors, E their eigenvalues. psift damps each
side by itself, the others damp the products: two different H, 1 % apart in what they rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.core.full_precision import full_precision, product
from treering.core.projection import Side, projection
from treering.sketches.settings import SketchSettings


@dataclass(frozen=True, kw_only=True)
class SideBasis:
    """The eigenbasis of one side of a module's curvature.

    Attributes:
        values: E [d], ascending.
        vectors: Q [d, d], eigenvectors in its columns; None: the identity, of a diagonal moment (of an embedding).
    """

    values: Tensor
    vectors: Tensor | None = None

    def leading(self, count: int | None) -> Tensor:
        """Return the last `count` eigenvectors [d, count], those of the largest eigenvalues; None: all."""
        first = 0 if count is None else max(0, len(self.values) - count)
        if self.vectors is not None:
            return self.vectors[:, first:]
        order = self.values.argsort(stable=True)[first:]
        chosen = torch.zeros(len(self.values), len(order), dtype=self.values.dtype, device=self.values.device)
        chosen[order, torch.arange(len(order), device=order.device)] = 1
        return chosen

    def leading_values(self, count: int | None) -> Tensor:
        """Return the eigenvalues of `leading`, in its order."""
        first = 0 if count is None else max(0, len(self.values) - count)
        values = self.values if self.vectors is not None else self.values.sort(stable=True).values
        return values[first:]


@dataclass(frozen=True, kw_only=True)
class GridInverse:
    """H⁻¹ of a module on the grid of its eigenbases, which `exact` applies to queries: values [N, M]."""

    left: Tensor
    right: Tensor
    values: Tensor

    def apply(self, G: Tensor) -> Tensor:
        """Return H⁻¹ of gradients G […, N, M]."""
        left, right = self.left.to(G), self.right.to(G)
        with full_precision():
            return left @ ((left.mT @ G @ right) * self.values.to(G)) @ right.mT


@dataclass(frozen=True, kw_only=True)
class ModuleMap:
    """How the gradient of one matrix becomes numbers.

    Attributes:
        name: the canonical name of the module.
        outputs, inputs: N and M.
        left: [rows, N], applied to g; None: the identity.
        right: [columns, M], applied to a; None: the identity.
        weights: [rows, columns], by which the numbers are multiplied at the end; None: ones.
        inverse: applied to a query in place of `weights`; None: a query is mapped as a document is.
    """

    name: str
    outputs: int
    inputs: int
    left: Tensor | None = None
    right: Tensor | None = None
    weights: Tensor | None = None
    inverse: GridInverse | None = None

    @property
    def rows(self) -> int:
        return self.outputs if self.left is None else len(self.left)

    @property
    def columns(self) -> int:
        return self.inputs if self.right is None else len(self.right)

    @property
    def numbers(self) -> int:
        return self.rows * self.columns

    def map_gradients(self, g_TN: Tensor) -> Tensor:
        """Return [T, rows] of gradients of outputs, at least float32."""
        return _mapped(g_TN, self.left)

    def map_inputs(self, a_TM: Tensor) -> Tensor:
        """Return [T, columns] of inputs, at least float32; of an embedding the tokens [T] stand for its inputs."""
        if a_TM.is_floating_point():
            return _mapped(a_TM, self.right)
        if self.right is None:
            return torch.nn.functional.one_hot(a_TM.long(), self.inputs).float()
        return self.right.mT[a_TM.long()]

    def document(self, sums: Tensor, *, in_place: bool = False) -> Tensor:
        """Return the numbers [n, rows · columns] of documents from their sums [n, rows, columns]."""
        if self.weights is None:
            return sums.flatten(1)
        weights = self.weights.to(sums)
        return (sums.mul_(weights) if in_place else sums * weights).flatten(1)

    def query(self, sums: Tensor) -> Tensor:
        """Return the numbers of queries from their sums, so that a score is a product with a document's numbers."""
        return self.document(sums) if self.inverse is None else self.inverse.apply(sums).flatten(1)

    def to(self, device: torch.device | str) -> "ModuleMap":
        """Return the map with its tensors on a device."""
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        inverse = self.inverse and replace(
            self.inverse, **{k: getattr(self.inverse, k).to(device) for k in ("left", "right", "values")}
        )
        return replace(self, left=move(self.left), right=move(self.right), weights=move(self.weights), inverse=inverse)


def module_map(
    settings: SketchSettings,
    name: str,
    outputs: int,
    inputs: int,
    *,
    input_basis: SideBasis | None = None,
    gradient_basis: SideBasis | None = None,
    corrected: Tensor | None = None,
    mean: float | None = None,
) -> ModuleMap:
    """Return the map of one matrix.

    Args:
        settings: of the index.
        name: the canonical name of the module, from which its projections follow.
        outputs, inputs: N and M; of a matrix with a bias, one input more, which is 1.
        input_basis, gradient_basis: of A and S; none with curvature `identity`.
        corrected: Λ [N, M], eigenvalues ascending along both; with a `block` also the corner of the leading ones.
        mean: of all of Λ, where `corrected` is such a corner.
    """
    if settings.curvature == "identity":
        bases = None
    elif input_basis is None or gradient_basis is None or (settings.curvature == "ekfac" and corrected is None):
        raise CheckpointError(
            f"{name} has no {'corrected eigenvalues' if input_basis and gradient_basis else 'eigenbases'} in the "
            f"statistics, which curvature {settings.curvature} needs; measure them, or leave the module out"
        )
    else:
        bases = gradient_basis, input_basis
        _check_shapes(name, outputs, inputs, *bases)
    plain = ModuleMap(name=name, outputs=outputs, inputs=inputs)
    if settings.kind == "psift":
        left = _sketch_side(settings, name, "gradients", outputs, bases and bases[0])
        right = _sketch_side(settings, name, "inputs", inputs, bases and bases[1])
        return replace(plain, left=left, right=right)
    if bases is None:
        return plain
    block = settings.block if settings.kind == "eigen-topk" else None
    used = corrected if settings.curvature == "ekfac" else None
    power = -0.5 if settings.kind == "eigen-topk" else -1.0
    values = grid_power(name, *bases, used, mean=mean, damping=settings.damping, power=power, block=block)
    left, right = (basis.leading(block).float() for basis in bases)
    if settings.kind == "exact":
        return replace(plain, inverse=GridInverse(left=left, right=right, values=values.float()))
    # Views: modules with the same inputs have one basis in memory, by which `RowSums` knows that their maps are equal.
    return replace(plain, left=left.mT, right=right.mT, weights=values.float())


def inverse_root(name: str, side: Side, basis: SideBasis, damping: float) -> Tensor:
    """Return (E + damping · mean E)^(−½) of a side, float64."""
    values = basis.values.double().clamp_min(0)
    damped = values + damping * values.mean()
    _check_positive(f"{name}, {side}", damped, damping)
    return damped.rsqrt()


def grid_power(
    name: str,
    gradients: SideBasis,
    inputs: SideBasis,
    corrected: Tensor | None,
    *,
    damping: float,
    power: float,
    mean: float | None = None,
    block: int | None = None,
) -> Tensor:
    """Return (Λ + damping · mean Λ)^power, float64, of the leading `block` × `block` eigenvectors or of all."""
    E_S, E_A = (basis.leading_values(block).double().clamp_min(0) for basis in (gradients, inputs))
    shape = len(E_S), len(E_A)
    if corrected is None:
        values = E_S[:, None] * E_A
        average = gradients.values.double().clamp_min(0).mean() * inputs.values.double().clamp_min(0).mean()
    else:
        full = tuple(corrected.shape) == (len(gradients.values), len(inputs.values))
        if not full and (tuple(corrected.shape) != shape or mean is None):
            raise CheckpointError(
                f"{name} has corrected eigenvalues of {tuple(corrected.shape)}, and bases of {len(gradients.values)} "
                f"and {len(inputs.values)}; measure them again with the same block"
            )
        values = corrected.double().clamp_min(0)
        average = values.mean() if full else torch.tensor(mean, dtype=torch.float64, device=values.device)
        values = values[-shape[0] :, -shape[1] :]
    damped = values + damping * average
    _check_positive(name, damped, damping)
    return damped**power


def _sketch_side(settings: SketchSettings, name: str, side: Side, size: int, basis: SideBasis | None) -> Tensor | None:
    """Return M = R H^(−½) of a side, float32; H^(−½) where the side has no more than p; None for the identity."""
    R = None
    if size > settings.size:
        R = projection(settings.seed, name, side, settings.size, size, distribution=settings.distribution)
    if basis is None:
        return R
    root = inverse_root(name, side, basis, settings.damping)
    if R is not None:
        R = R.to(root)
    if basis.vectors is None:
        return (torch.diag(root) if R is None else R * root).float()
    Q = basis.vectors.double()
    return (((Q if R is None else R @ Q) * root) @ Q.mT).float()


def _mapped(x: Tensor, matrix: Tensor | None) -> Tensor:
    if matrix is None:
        return x if x.dtype == torch.float64 else x.float()
    with full_precision():
        return product(x, matrix.mT)


def _check_shapes(name: str, outputs: int, inputs: int, gradients: SideBasis, of_inputs: SideBasis) -> None:
    found = len(gradients.values), len(of_inputs.values)
    if found != (outputs, inputs):
        raise CheckpointError(
            f"{name} is {outputs} × {inputs} and its eigenbases are of {found[0]} × {found[1]}: they were measured on "
            "another model; measure this one"
        )


def _check_positive(what: str, damped: Tensor, damping: float) -> None:
    if not bool(torch.isfinite(damped).all()):
        raise CheckpointError(f"{what}: its eigenvalues are not all finite; measure again")
    if not bool((damped > 0).all()):
        zero = "all of them, as if nothing reached it; leave the module out, or measure more text"
        some = "of them some, and damping is 0; set damping: 0.1"
        raise CheckpointError(f"{what}: eigenvalues of the curvature are 0, {some if bool(damped.any()) else zero}")
