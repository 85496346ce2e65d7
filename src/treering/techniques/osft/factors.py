"""Forms `forward` and `factors`: the weight is gone, and its singular factors stand in its place.

    W = U_h S_h V_hᵀ + U_l S_l V_lᵀ        U N×k, V M×k        h: held, frozen        l: free, learning

V is M×k and not k×M: FSDP2 deals dimension 0, and it is over M that Qᵀ X is a sum (wire.py). Where a basis is to be
gathered instead (`wire` gather, cached), both are stored turned, k×N and k×M, so that ranks have whole rows.

Stacked experts are read by their module slice by slice, whatever its implementation: it is shown a weight made of the
factors, for the time of its forward. That weight lives until the backward, as a plain one would.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.core.module_forward import ModuleForward, install
from treering.technique import Applied, LazyTensor, Part, Site
from treering.techniques.osft import passes
from treering.techniques.osft.decompose import svd
from treering.techniques.osft.factored import HIGH, LOW, Factored, FactoredExperts, FactoredLinear, Triple
from treering.techniques.osft.ranks import free
from treering.techniques.osft.retract import Steps
from treering.techniques.osft.targets import Target, oriented

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


def attach(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Target]) -> Applied:
    """`chosen` have at least one free direction each."""
    parts: dict[str, Part] = {}
    own: dict[str, Factored] = {}
    stacked: dict[str, dict[str, tuple[Target, FactoredExperts]]] = {}
    for target in chosen:
        module, leaf = model.get_submodule(target.module), target.weight.rpartition(".")[2]
        dtype = torch.promote_types(model.get_parameter(target.weight).dtype, torch.float32)
        kind = FactoredLinear if target.experts is None else FactoredExperts
        made = kind(config, target, free(config, target), dtype, site.mesh)
        child = "osft" if target.experts is None else f"osft_{leaf}"
        delattr(module, leaf)
        module.add_module(child, made)
        own[f"{target.module}.{child}"] = made
        parts[target.weight] = part(target, made, f"{target.module}.{child}", dtype)
        if isinstance(made, FactoredExperts):
            stacked.setdefault(target.module, {})[leaf] = target, made
        else:
            install(_FactoredForward(module, made))
    for name, weights in stacked.items():
        install(_ShownForward(model.get_submodule(name), weights))
    steps = Steps(own)
    hooks = {"gradients": steps.project, "after_step": steps.retract} if config.form == "factors" else {}
    return Applied(
        trainable=tuple(f"{name}.{factor}" for name in own for factor in LOW),
        parts=parts,
        before_step=steps.before,
        metrics=steps.metrics,
        notes=(_note(config, own),),
        **hooks,  # type: ignore[arg-type]
    )


def _note(config: "OSFTSettings", own: Mapping[str, Factored]) -> str:
    numbers = sum(p.numel() for factored in own.values() for p in factored.parameters())
    learning = sum(getattr(factored, name).numel() for factored in own.values() for name in LOW)
    wire = f", wire {config.wire}" if config.form == "factors" else ""
    return f"{len(own)} weights as {numbers / 1e6:.1f} M numbers, {learning / 1e6:.1f} M learn{wire}"


class _FactoredForward(ModuleForward):
    """Of a linear whose weight is factors."""

    def __init__(self, module: nn.Module, factored: FactoredLinear):
        super().__init__(module)
        self.factored = factored

    def __call__(self, x: Tensor) -> Tensor:
        return self.factored(x, self.module.bias)


class _ShownForward(ModuleForward):
    """Of stacked experts that are shown weights made of factors."""

    def __init__(self, module: nn.Module, weights: Mapping[str, tuple[Target, FactoredExperts]]):
        super().__init__(module)
        self.weights = dict(weights)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        shown = []
        try:
            for leaf, (target, factored) in self.weights.items():
                hidden, weight = factored(hidden)
                setattr(self.module, leaf, oriented(weight, target))
                shown.append(leaf)
            return self.call_former(hidden, *args, **kwargs)
        finally:
            for leaf in shown:
                delattr(self.module, leaf)


def part(target: Target, factored: Factored, own: str, dtype: torch.dtype) -> Part:
    names = tuple(f"{own}.{name}" for name, _ in (*factored.named_parameters(), *factored.named_buffers()))

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        U, S, V = svd(oriented(weight.read().to(dtype), target))
        k = factored.held
        found = {"U_high": U[..., :k], "S_high": S[..., :k], "V_high": V[..., :k]}
        found |= {"U_low": U[..., k:], "S_low": S[..., k:], "V_low": V[..., k:]}
        found |= {"U_free": U[..., k:], "V_free": V[..., k:]}
        if factored.turned:
            found = {name: value if name[0] == "S" else value.mT for name, value in found.items()}
        # Of their own memory each: a file of tensors that share some is refused.
        return {n: found[n.rpartition(".")[2]].clone(memory_format=torch.contiguous_format) for n in names}

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        def triple(names: tuple[str, ...]) -> Triple:
            wide = torch.promote_types(dtype, torch.float32)
            U, S, V = (tensors[f"{own}.{name}"].to(wide) for name in names)
            return (U.mT, S, V.mT) if factored.turned else (U, S, V)

        high = triple(HIGH) if factored.held else None
        W = passes.weight(high, triple(LOW), factored.projected, dtype)
        return below + oriented(W, target).to(below.device)

    return Part(
        names=names,
        split=split,
        join=join,
        keeps_base=False,
        compute_dtype=dtype,
        tolerance=1e-5,
        independent_rows=target.experts is not None,
        cost=float(target.rank * target.outputs * target.inputs * (target.experts or 1)),
        identity=f"osft factors {factored.held} {factored.turned} {sorted(names)}",
        measured=False,
    )
