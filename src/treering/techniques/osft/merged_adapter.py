"""Form `merged`: an adapter in the trainable directions of the inputs that is part of the weight at all times.

    ΔW = Z Bᵀ                 Z [N, k] trains, from zero; B [M, k]: trainable directions, each times c and its value
    dZ = gᵀ (x B)             in the backward; of the inputs x only x B is kept for it
    W ← W + (Z' − Z) Bᵀ       after each step, on this rank's rows

The steps are those of form one_sided, and the forward is that of the plain model. In place of a gradient of W there is
one of Z, and an optimizer has a state of its size: with k = M/4, arithmetic, memory and messages are below those of
training W itself.

Of a stack of experts every tensor has a leading dimension E.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from treering.anatomy.matrices import Matrix
from treering.core.full_precision import full_precision, product
from treering.core.module_forward import undo_all
from treering.core.sharded import local, start_gather
from treering.experts.grouped_forward import add_to
from treering.experts.products import rows_by_rows, rows_by_stack
from treering.technique import Adapter, Applied, LazyTensor, Part, Site, TrainedMatrix, Workload
from treering.techniques.osft import traffic
from treering.techniques.osft.protection import operators
from treering.techniques.osft.protection.coverage import frozen
from treering.techniques.osft.update.update_form import refuse_narrow
from treering.weights import peft_layout
from treering.weights.peft_layout import Half, PublishedPair

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings

CHILD = "osft"


class MergedAdapter(nn.Module):
    """The gradient of Z [N, k], from the input and the output of a linear layer. The output stays as it is."""

    def __init__(self, matrix: Matrix, columns: int, dtype: torch.dtype, precision: torch.dtype):
        super().__init__()
        lead = matrix.lead
        basis = torch.empty(*lead, matrix.inputs, columns, dtype=precision, device="meta")
        self.B = nn.Parameter(basis, requires_grad=False)
        self.Z = nn.Parameter(torch.empty(*lead, matrix.outputs, columns, dtype=dtype, device="meta"))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y, the output of the layer for the input x."""
        return _LinearGradient.apply(y, _narrow(x, self.B, y.dtype), self.Z) if torch.is_grad_enabled() else y

    def seen(self, expert: int | None, rows: Tensor) -> Tensor:
        """Return inputs, one token a row, as Z sees them."""
        B = self.B if expert is None else self.B[expert]
        with full_precision():
            return rows.to(self.Z.dtype) @ B.to(self.Z.dtype)


class ExpertMergedAdapter(MergedAdapter):
    """The same for rows x [S, M] of a stack of experts, which are sorted by expert and end at `offsets`."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return what is added to the output of the experts: zeros, for whose gradient Z has one."""
        if not torch.is_grad_enabled():
            return x.new_zeros(()).expand(x.shape[0], self.Z.shape[1])
        with torch.no_grad(), full_precision():
            low = rows_by_stack(x, self.B.to(x.dtype), offsets)
        return _ExpertsGradient.apply(low, self.Z, offsets)


@torch.no_grad()
def _narrow(x: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x B in the dtype of the layer's output. A basis of hard protection is not rounded to it before."""
    with full_precision():
        return (x.to(dtype) @ B.to(dtype) if B.dtype.itemsize <= dtype.itemsize else product(x, B)).to(dtype)


class _LinearGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, Z: Tensor) -> Tensor:
        ctx.save_for_backward(low)
        ctx.dtype = Z.dtype
        return y.detach()  # a view would refuse models that write into a layer's output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
        (low,) = ctx.saved_tensors
        dZ = g.reshape(-1, g.shape[-1]).mT @ low.reshape(-1, low.shape[-1]).to(g.dtype)
        return g, None, dZ.to(ctx.dtype)


class _ExpertsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, low: Tensor, Z: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(low, offsets)
        ctx.dtype = Z.dtype
        return low.new_zeros(()).expand(low.shape[0], Z.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        low, offsets = ctx.saved_tensors
        return None, rows_by_rows(g.contiguous(), low.to(g.dtype), offsets).to(ctx.dtype), None


class MergingSteps:
    """What happens to the weights of one model around an optimizer's step: W ← W + (Z' − Z) Bᵀ.

    Args:
        prefixes: the live name of the adapter of each weight.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], prefixes: Mapping[str, str]):
        self.model, self.matrices, self.prefixes = model, tuple(matrices), prefixes
        self._old: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self, optimizers: Sequence[Optimizer]) -> None:
        """Copy what the optimizer is about to change."""
        if not self._old:  # a step that failed has left what is not merged yet
            self._old = {m.weight: self._Z(m).detach().clone() for m in self.matrices}

    @torch.no_grad()
    def merge(self) -> None:
        """Add the step to the weights. A collective: one basis is gathered while another one is multiplied."""
        ahead = [self._gathered(matrix) for matrix in self.matrices[:1]]
        for i, matrix in enumerate(self.matrices):
            gathered = ahead.pop()()
            ahead += [self._gathered(later) for later in self.matrices[i + 1 : i + 2]]
            weight = local(self.model.get_parameter(matrix.weight))
            with full_precision():
                if matrix.transposed:  # its rows are inputs, and so are those of B
                    change = product(local(_at_work(self._B(matrix))).to(gathered.dtype), gathered.mT)
                else:
                    change = product(local(_at_work(self._step(matrix))), gathered.mT)
            weight.add_(change.to(weight.device))
        self._old = {}

    def messages(self, work: Workload) -> list[Any]:
        """Return what `merge` sends."""
        return traffic.of_merging([self._B(m) if not m.transposed else self._Z(m) for m in self.matrices if not m.lead])

    def _gathered(self, matrix: Matrix) -> Callable[[], Tensor]:
        """Start to gather the factor of ΔW that acts on columns. Those of experts are with the experts."""
        factor = _at_work(self._step(matrix) if matrix.transposed else self._B(matrix))
        if matrix.lead:
            return lambda: local(factor)
        return start_gather(factor)

    def _step(self, matrix: Matrix) -> Tensor:
        return self._Z(matrix).detach() - self._old[matrix.weight]

    def _Z(self, matrix: Matrix) -> Tensor:
        return self.model.get_parameter(f"{self.prefixes[matrix.weight]}.Z")

    def _B(self, matrix: Matrix) -> Tensor:
        return self.model.get_parameter(f"{self.prefixes[matrix.weight]}.B").detach()


def _at_work(value: Tensor) -> Tensor:
    """Return `value` on the device that computes: parameters that are offloaded rest on the host."""
    if isinstance(value, DTensor) and value.device_mesh.device_type != local(value).device.type:
        return value.to(value.device_mesh.device_type)  # type: ignore[no-any-return]
    return value


def install(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Matrix]) -> Applied:
    """Put an adapter next to each of the matrices `chosen`: linear layers and stacks of experts."""
    dtypes = {matrix.weight: model.get_parameter(matrix.weight).dtype for matrix in chosen}
    refuse_narrow(config, dtypes)
    parts, undo, maps, prefixes = {}, [], {}, {}
    for matrix in chosen:
        module, dtype = model.get_submodule(matrix.module), dtypes[matrix.weight]
        shape = operators.adapter_shapes(config, matrix)["in"]
        soft = config.strength == "soft" and config.precision == "bfloat16" and dtype == torch.float32
        kind = ExpertMergedAdapter if matrix.lead else MergedAdapter
        adapter = kind(matrix, shape.columns, dtype, torch.bfloat16 if soft else dtype)
        child = f"{CHILD}_{matrix.leaf}" if matrix.lead else CHILD
        prefix = prefixes[matrix.weight] = f"{matrix.module}.{child}"
        module.add_module(child, adapter)
        undo.append(add_to(module, matrix, adapter)[1])
        maps[matrix.weight] = tuple(
            TrainedMatrix(
                name=f"{prefix}.Z", module=one.module, expert=one.expert, inputs=partial(adapter.seen, one.expert)
            )
            for one in matrix.each()
        )
        parts[matrix.weight] = _part(config, matrix, shape, prefix, dtype)
    steps = MergingSteps(model, chosen, prefixes)
    return Applied(
        trainable=tuple(f"{prefix}.Z" for prefix in prefixes.values()),
        parts=parts,
        before_step=steps.remember,
        after_step=steps.merge,
        adapter=_published(chosen, model, prefixes),
        undo=undo_all(undo),
        messages=steps.messages,
        maps=maps,
        notes=(f"{len(prefixes)} weights train in their trainable directions, as adapters that are part of them",),
    )


def _part(
    config: "OSFTSettings", matrix: Matrix, shape: operators.OperatorShape, prefix: str, dtype: torch.dtype
) -> Part:
    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        # Of a stack it may be some of the experts.
        some = replace(matrix, experts=weight.shape[0]) if matrix.lead else matrix
        bases = operators.bases((shape,), some, config.damping, weight.read, statistics)
        basis = bases["in"]
        assert not isinstance(basis, Tensor), "that is of form update"
        c = operators.scale((shape,), bases, some, frozen(config, statistics))
        B = basis[0] * (basis[1] * (c[:, None] if matrix.lead else c))[..., None, :]
        return {f"{prefix}.B": B, f"{prefix}.Z": torch.zeros(*some.lead, matrix.outputs, shape.columns, dtype=dtype)}

    return Part(
        names=(f"{prefix}.B", f"{prefix}.Z"),
        split=split,
        join=lambda tensors, below: below,
        joins=(),
        writes_base=True,
        # A rounded basis of hard protection would leak what it protects.
        compute_dtype=dtype if config.strength == "hard" else None,
        tolerance=0.0,
        independent_rows=bool(matrix.lead),
        cost=operators.cost((shape,), matrix),
        identity=operators.identity(config, (shape,)),
    )


def _published(chosen: Sequence[Matrix], model: nn.Module, prefixes: Mapping[str, str]) -> Adapter:
    """Return how the adapters are published as LoRA: A is Bᵀ, B is Z."""
    pairs = []
    for matrix in chosen:
        prefix = prefixes[matrix.weight]
        rank = model.get_parameter(f"{prefix}.Z").shape[-1]
        names, half = (f"{prefix}.Z", f"{prefix}.B"), partial(_half, prefix)  # published in the dtype of the first
        pairs.append(PublishedPair(matrix=matrix, rank=rank, alpha=float(rank), names=names, half=half))
    return peft_layout.describe("osft", pairs, rank=pairs[0].rank, alpha=pairs[0].alpha)


def _half(prefix: str, half: Half, tensors: Mapping[str, Tensor]) -> Tensor:
    Z = tensors[f"{prefix}.Z"]
    return tensors[f"{prefix}.B"].to(Z.dtype).mT if half == "A" else Z
