"""Forms `one_sided` and `core`: an adapter in the trainable directions, next to a weight that does not change.

    ΔW = c · B_out Z B_inᵀ        Z trains, from zero; c: see operators.scale

On each end is a basis B of the trainable directions, or, where that would not be smaller, the operator P, applied to Z
in the forward. one_sided has one basis, on the end where the trainable directions are few and all of them are in it;
core has both, which for a weight that is not square leaves out what is trainable on the longer end alone.

Of a stack of experts every tensor has a leading dimension E, and the adapter is called with rows sorted by expert.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.anatomy.matrices import Matrix
from treering.core import module_forward
from treering.core.full_precision import full_precision, product
from treering.experts.grouped_forward import add_to
from treering.experts.products import stack_product
from treering.technique import Adapter, Applied, LazyTensor, Part, Site, TrainedMatrix
from treering.techniques.osft.protection import operators
from treering.techniques.osft.protection.coverage import frozen
from treering.techniques.osft.protection.operators import End, Operator, OperatorShape
from treering.weights import peft_layout
from treering.weights.peft_layout import Half, PublishedPair

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


class ProtectedAdapter(nn.Module):
    """c · B_out Z B_inᵀ x. What decides which directions train is computed in float32 or wider, the rest as x is.

    Parameters: Z; B or Q and `rest` of each end, and `values`, all frozen.
    """

    def __init__(self, matrix: Matrix, shapes: Mapping[End, OperatorShape], dtype: torch.dtype):
        super().__init__()
        self.shapes = dict(shapes)
        sizes, lead = {"out": matrix.outputs, "in": matrix.inputs}, matrix.lead
        for end, shape in shapes.items():
            self._add_frozen(f"B_{end}" if shape.thin else f"Q_{end}", (*lead, shape.size, shape.columns), dtype)
            self._add_frozen(f"values_{end}", (*lead, shape.columns), dtype)
            if shape.thin:
                sizes[end] = shape.columns
            else:
                self._add_frozen(f"rest_{end}", (*lead, 1), dtype)
        self.Z = nn.Parameter(torch.empty(*lead, sizes["out"], sizes["in"], dtype=dtype, device="meta"))

    def _add_frozen(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        tensors = dict(self.named_parameters())
        with full_precision():
            Z = projected(self.shapes, tensors)
            if "in" in self.shapes and self.shapes["in"].thin:
                # Inputs are large in protected directions: rounded before the basis is applied, they would leak.
                x_low = product(x, tensors["B_in"])
            else:
                x_low = x
        y = F.linear(x_low.to(x.dtype), Z.to(x.dtype))
        thin_out = "out" in self.shapes and self.shapes["out"].thin
        return base + (F.linear(y, tensors["B_out"].to(y.dtype)) if thin_out else y)

    def trained(self, name: str, matrix: Matrix) -> tuple[TrainedMatrix, ...]:
        """Return where the inputs and output gradients of Z, whose live name is `name`, are seen."""

        def seen(end: End, expert: int | None) -> "Callable[[Tensor], Tensor] | None":
            return partial(self._seen, end, expert) if end in self.shapes else None

        return tuple(
            TrainedMatrix(
                name=name,
                module=one.module,
                expert=one.expert,
                inputs=seen("in", one.expert),
                outputs=seen("out", one.expert),
            )
            for one in matrix.each()
        )

    def _seen(self, end: End, expert: int | None, rows: Tensor) -> Tensor:
        """Return inputs or output gradients, one token a row, as Z sees them at one end."""
        tensors = {name: t if expert is None else t[expert] for name, t in self.named_parameters()}
        values, rows = tensors[f"values_{end}"], rows.to(self.Z.dtype)
        with full_precision():
            if self.shapes[end].thin:
                return rows @ tensors[f"B_{end}"] * values
            return Operator(tensors[f"Q_{end}"], values, tensors[f"rest_{end}"]).right(rows)


class ExpertProtectedAdapter(ProtectedAdapter):
    """The adapters of a stack of experts."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return c · B_out Z B_inᵀ x for rows x [S, M] that are sorted by expert and end at `offsets`."""
        tensors = dict(self.named_parameters())
        thin = {end: shape.thin for end, shape in self.shapes.items()}
        with full_precision():
            Z = projected(self.shapes, tensors)
            x_low = stack_product(x, tensors["B_in"].mT, offsets) if thin.get("in") else x
        y = stack_product(x_low.to(x.dtype), Z.to(x.dtype), offsets)
        return stack_product(y, tensors["B_out"].to(y.dtype), offsets) if thin.get("out") else y


def projected(shapes: Mapping[End, OperatorShape], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return Z as it acts between the bases: operators applied, values multiplied in."""
    Z = tensors["Z"]
    for end, shape in shapes.items():
        values = tensors[f"values_{end}"]
        if shape.thin:
            Z = Z * values[..., None, :] if end == "in" else values[..., :, None] * Z
        else:
            operator = Operator(tensors[f"Q_{end}"], values, tensors[f"rest_{end}"])
            Z = operator.right(Z) if end == "in" else operator.left(Z)
    return Z


def change(shapes: Mapping[End, OperatorShape], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return ΔW, outputs × inputs."""
    with full_precision():
        D = projected(shapes, tensors)
        if "in" in shapes and shapes["in"].thin:
            D = D @ tensors["B_in"].mT
        return tensors["B_out"] @ D if "out" in shapes and shapes["out"].thin else D


def install(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Matrix]) -> Applied:
    """Put an adapter next to each of the matrices `chosen`: linear layers and stacks of experts."""
    parts, names, undo, maps = {}, [], [], {}
    added: list[module_forward.Switchable] = []
    for matrix in chosen:
        module = model.get_submodule(matrix.module)
        weight = getattr(module, matrix.leaf, None)
        dtype = torch.promote_types(torch.float32 if weight is None else weight.dtype, torch.float32)
        kind = ExpertProtectedAdapter if matrix.lead else ProtectedAdapter
        adapter = kind(matrix, operators.adapter_shapes(config, matrix), dtype)
        module.add_module(_child(matrix), adapter)
        switch, remove = add_to(module, matrix, adapter)
        added.append(switch)
        undo.append(remove)
        prefix = f"{matrix.module}.{_child(matrix)}"
        names.append(f"{prefix}.Z")
        maps[matrix.weight] = adapter.trained(f"{prefix}.Z", matrix)
        parts[matrix.weight] = _part(matrix, config, prefix, adapter, dtype)

    return Applied(
        trainable=tuple(names),
        parts=parts,
        adapter=describe(chosen, model),
        undo=module_forward.undo_all(undo),
        maps=maps,
        without=partial(module_forward.switched_off, added),
        notes=(f"{len(names)} adapters in the trainable directions",),
    )


def _child(matrix: Matrix) -> str:
    return f"osft_{matrix.leaf}" if matrix.lead else "osft"


def _part(matrix: Matrix, config: "OSFTSettings", prefix: str, adapter: ProtectedAdapter, dtype: torch.dtype) -> Part:
    Z_shape = tuple(adapter.Z.shape)  # of the complete tensor: sharding will replace the parameter
    shapes = tuple(adapter.shapes.values())

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        # Of a stack it may be some of the experts.
        some = replace(matrix, experts=weight.shape[0]) if matrix.lead else matrix
        bases = operators.bases(shapes, some, config.damping, weight.read, statistics)
        tensors = {f"{prefix}.Z": torch.zeros((*some.lead, *Z_shape[-2:]), dtype=dtype)}
        c = operators.scale(shapes, bases, some, frozen(config, statistics))
        c = c[:, None] if matrix.lead else c
        for shape in shapes:
            basis = bases[shape.end]
            assert not isinstance(basis, Tensor), "that is of form update"
            Q, values = basis
            tensors[f"{prefix}.{'B' if shape.thin else 'Q'}_{shape.end}"] = Q
            tensors[f"{prefix}.values_{shape.end}"] = c * values
            if not shape.thin:
                tensors[f"{prefix}.rest_{shape.end}"] = c
            c = torch.ones_like(c)  # applied once, at the first end
        return tensors

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        local_names = {
            name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")
        }
        return below + matrix.oriented(change(adapter.shapes, local_names)).to(below.device)

    return Part(
        names=tuple(f"{prefix}.{name}" for name, _ in adapter.named_parameters()),
        split=split,
        join=join,
        compute_dtype=dtype,
        tolerance=0.0,
        independent_rows=bool(matrix.lead),
        cost=operators.cost(shapes, matrix),
        identity=operators.identity(config, shapes),
        measured=config.protect != "weights",
    )


def describe(chosen: Sequence[Matrix], model: nn.Module) -> Adapter:
    """Return how the adapters are published as LoRA: A and B of each matrix, computed from Z and the bases."""
    pairs = []
    for matrix in chosen:
        prefix = f"{matrix.module}.{_child(matrix)}"
        adapter: ProtectedAdapter = model.get_submodule(prefix)  # type: ignore[assignment]
        rank = min(adapter.Z.shape[-2:])
        names = tuple(f"{prefix}.{name}" for name, _ in adapter.named_parameters())
        pairs.append(
            PublishedPair(matrix=matrix, rank=rank, alpha=float(rank), names=names, half=partial(_half, adapter.shapes))
        )
    return peft_layout.describe("osft", pairs, rank=pairs[0].rank, alpha=pairs[0].alpha)


def _half(shapes: Mapping[End, OperatorShape], half: Half, tensors: Mapping[str, Tensor]) -> Tensor:
    local_names = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    Z = projected(shapes, local_names)
    out, into = local_names.get("B_out"), local_names.get("B_in")
    if Z.shape[-2] <= Z.shape[-1]:  # few rows: A is Z times the basis of inputs, B the basis of outputs
        if half == "A":
            return Z if into is None else Z @ into.mT
        return _identity(Z.shape[-2], Z) if out is None else out
    if half == "B":
        return Z if out is None else out @ Z
    return _identity(Z.shape[-1], Z) if into is None else into.mT


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(*like.shape[:-2], size, size)
