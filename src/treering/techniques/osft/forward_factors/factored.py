"""Forms `forward` and `factors`: a weight is replaced by its singular factors.

    W = U_h S_h V_hᵀ + U_l S_l V_lᵀ        U N×k, V M×k        h: protected, frozen        l: trained

V is M×k and not k×M: FSDP2 shards dimension 0, and it is over M that Qᵀ X is a sum (communication.py). Where a basis is
to be gathered instead (`communication` gather, cached), both are stored turned, k×N and k×M: ranks have complete rows.

Stacked experts are shown a weight computed from the factors during the forward of their module. That weight lives until
the backward, as a plain one would.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import Matrix
from treering.core import module_forward
from treering.core.full_precision import full_precision
from treering.core.sharded import TensorCache, meta_rows
from treering.experts.stacked_forward import ShownWeights
from treering.technique import Applied, LazyTensor, Part, Site
from treering.techniques.osft.forward_factors import passes
from treering.techniques.osft.forward_factors.communication import Projection
from treering.techniques.osft.forward_factors.factor_steps import FactorSteps
from treering.techniques.osft.protection.decompose import finite, svd
from treering.techniques.osft.protection.targets import trainable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.techniques.osft.settings import OSFTSettings

LOW = ("U_low", "S_low", "V_low")
HIGH = ("U_high", "S_high", "V_high")


class Factored(nn.Module):
    """The factors of one weight. A module of its own, because FSDP casts the parameters of a module to one dtype, and
    bases stay in float32."""

    def __init__(
        self, config: "OSFTSettings", matrix: Matrix, number: int, dtype: torch.dtype, mesh: "DeviceMesh | None"
    ):
        super().__init__()
        self.sizes = (matrix.outputs, matrix.inputs)
        self.protected, self.trainable = matrix.rank - number, number
        self.projected, self.compute = config.form == "forward", config.compute
        self.turned = config.form == "factors" and config.communication != "coefficients" and matrix.experts is None
        self.caches = {end: TensorCache() for end in "UV"} if self.turned and config.communication == "cached" else {}
        for names, k in ((HIGH, self.protected), (LOW, number)):
            for name in names if k else ():  # a parameter without a row or a column would be one more thing to shard
                shape: tuple[int, ...] = (k,) if name[0] == "S" else self._shape(name[0], k)
                empty = torch.empty(*matrix.lead, *shape, dtype=dtype, device="meta")
                self.register_parameter(name, nn.Parameter(empty, requires_grad=names is LOW))
        for end, size in zip("UV", self.sizes):
            # All trainable directions as they are before training: k_l×k_l coefficients are then enough to project. A
            # buffer, because FSDP would gather a parameter for forwards that never read it.
            if config.form == "factors" and size == matrix.rank and 0 < number < self.protected:
                shape = (*matrix.lead, *self._shape(end, number))
                self.register_buffer(f"{end}_free", meta_rows(shape, dtype, mesh))

    def _shape(self, end: str, k: int) -> tuple[int, int]:
        size = self.sizes["UV".index(end)]
        return (k, size) if self.turned else (size, k)

    @property
    def high(self) -> passes.Triple | None:
        return self._triple(HIGH) if self.protected else None

    @property
    def low(self) -> passes.Triple:
        return self._triple(LOW)

    def _triple(self, names: tuple[str, ...]) -> passes.Triple:
        U, S, V = (getattr(self, name) for name in names)
        return (U.mT, S, V.mT) if self.turned else (U, S, V)

    def projection(self, end: str, of: Callable[[nn.Parameter], Tensor | None], basis: str = "") -> Projection | None:
        """Return how `of` the low factor at this end is projected; None where `of` it is None or nothing is protected.

        With `basis` "high" against the protected directions, else against the basis that needs fewer coefficients.
        """
        value = of(getattr(self, f"{end}_low"))
        if value is None or not self.protected:
            return None
        inside = basis != "high" and f"{end}_free" in self._buffers
        against = getattr(self, f"{end}_free" if inside else f"{end}_high")
        cache = None if basis else self.caches.get(end)
        return Projection(value, against, inside=inside, turned=self.turned, cache=cache)


class FactoredLinear(Factored):
    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        way = self.compute
        if way == "auto":
            tokens = x.numel() // x.shape[-1]
            way = passes.choose(tokens, *self.sizes, self.protected, self.trainable, torch.is_grad_enabled())
        return passes.linear(x, bias, self.high, self.low, way=way, projected=self.projected)


class FactoredExperts(Factored):
    def __init__(
        self, config: "OSFTSettings", matrix: Matrix, number: int, dtype: torch.dtype, mesh: "DeviceMesh | None"
    ):
        super().__init__(config, matrix, number, dtype, mesh)
        self.matrix = matrix

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return `hidden` as it is, and the weight as the module stores it.

        What FSDP frees after the backward of a module it frees when the gradient of the module's input is there:
        without an input that passes through, at the end of the complete backward.
        """
        with full_precision():
            W = passes.weight(self.high, self.low, self.projected, hidden.dtype)
        return hidden, self.matrix.oriented(W)


class _FactoredForward(module_forward.ModuleForward):
    """The forward of a linear layer whose weight is factors."""

    as_method = True

    def __init__(self, module: nn.Module, factored: FactoredLinear):
        super().__init__(module)
        self.factored = factored

    def __call__(self, x: Tensor) -> Tensor:
        return self.factored(x, self.module.bias)


def install(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Matrix]) -> Applied:
    """Replace the weights `chosen`, which have at least one trainable direction each, by factors."""
    parts: dict[str, Part] = {}
    every: dict[str, Factored] = {}
    stacks: dict[str, dict[str, FactoredExperts]] = {}
    for matrix in chosen:
        module = model.get_submodule(matrix.module)
        dtype = torch.promote_types(model.get_parameter(matrix.weight).dtype, torch.float32)
        kind = FactoredLinear if matrix.experts is None else FactoredExperts
        factored = kind(config, matrix, trainable(config, matrix), dtype, site.mesh)
        child = "osft" if matrix.experts is None else f"osft_{matrix.leaf}"
        delattr(module, matrix.leaf)
        module.add_module(child, factored)
        every[f"{matrix.module}.{child}"] = factored
        parts[matrix.weight] = part(matrix, factored, f"{matrix.module}.{child}", dtype)
        if isinstance(factored, FactoredExperts):
            stacks.setdefault(matrix.module, {})[matrix.leaf] = factored
        else:
            module_forward.install(_FactoredForward(module, factored))
    for name, weights in stacks.items():
        module_forward.install(ShownWeights(model.get_submodule(name), weights))
    steps = FactorSteps(every)
    around = {"gradients": steps.project, "after_step": steps.retract, "messages": steps.messages}
    hooks = around if config.form == "factors" else {}
    return Applied(
        trainable=tuple(f"{name}.{factor}" for name in every for factor in LOW),
        parts=parts,
        before_step=steps.before,
        metrics=steps.metrics,
        notes=(_note(config, every),),
        **hooks,  # type: ignore[arg-type]
    )


def _note(config: "OSFTSettings", every: Mapping[str, Factored]) -> str:
    numbers = sum(p.numel() for factored in every.values() for p in factored.parameters())
    trained = sum(getattr(factored, name).numel() for factored in every.values() for name in LOW)
    communication = f", communication {config.communication}" if config.form == "factors" else ""
    return (
        f"{len(every)} weights as {numbers / 1e6:.1f} M numbers, {trained / 1e6:.1f} M of them trained{communication}"
    )


def part(matrix: Matrix, factored: Factored, prefix: str, dtype: torch.dtype) -> Part:
    """Return how `factored`, whose tensors are named after `prefix`, stores the plain weight."""
    names = tuple(f"{prefix}.{name}" for name, _ in (*factored.named_parameters(), *factored.named_buffers()))

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        U, S, V = svd(matrix.oriented(finite(weight.read(), matrix).to(dtype)))
        k = factored.protected
        tensors = {"U_high": U[..., :k], "S_high": S[..., :k], "V_high": V[..., :k]}
        tensors |= {"U_low": U[..., k:], "S_low": S[..., k:], "V_low": V[..., k:]}
        tensors |= {"U_free": U[..., k:], "V_free": V[..., k:]}
        if factored.turned:
            tensors = {name: value if name[0] == "S" else value.mT for name, value in tensors.items()}
        # Each in separate memory: a file of tensors that share some is refused.
        return {n: tensors[n.rpartition(".")[2]].clone(memory_format=torch.contiguous_format) for n in names}

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        def triple(names: tuple[str, ...]) -> passes.Triple:
            wide = torch.promote_types(dtype, torch.float32)
            U, S, V = (tensors[f"{prefix}.{name}"].to(wide) for name in names)
            return (U.mT, S, V.mT) if factored.turned else (U, S, V)

        high = triple(HIGH) if factored.protected else None
        W = passes.weight(high, triple(LOW), factored.projected, dtype)
        return below + matrix.oriented(W).to(below.device)

    return Part(
        names=names,
        split=split,
        join=join,
        keeps_base=False,
        compute_dtype=dtype,
        tolerance=1e-5,
        independent_rows=matrix.experts is not None,
        cost=float(matrix.rank * matrix.numel),
        identity=f"osft factors {factored.protected} {factored.turned} {sorted(names)}",
        measured=False,
    )
