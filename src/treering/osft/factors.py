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

from treering.exactly import exactly
from treering.forwards import ModuleForward, install
from treering.osft import passes
from treering.osft.decompose import svd
from treering.osft.held import dealt
from treering.osft.ranks import free
from treering.osft.retract import Steps
from treering.osft.targets import Target, oriented
from treering.osft.wire import Kept, Side
from treering.technique import Applied, LazyTensor, Part, Site

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.osft.config import OSFT

Triple = tuple[Tensor, Tensor, Tensor]
LOW = ("U_low", "S_low", "V_low")
HIGH = ("U_high", "S_high", "V_high")


class Factored(nn.Module):
    """A weight as factors. In a module of its own, because bases stay in float32 where FSDP casts all around them."""

    def __init__(self, config: "OSFT", target: Target, open_: int, dtype: torch.dtype, mesh: "DeviceMesh | None"):
        super().__init__()
        self.sizes = (target.outputs, target.inputs)
        self.held, self.open = target.rank - open_, open_
        self.projected, self.compute = config.form == "forward", config.compute
        self.turned = config.form == "factors" and config.wire != "coefficients" and target.experts is None
        self.kept = {end: Kept() for end in "UV"} if self.turned and config.wire == "cached" else {}
        lead = (target.experts,) if target.experts is not None else ()
        for names, k in ((HIGH, self.held), (LOW, open_)):
            for name in names if k else ():  # a parameter without a row or a column would be one more thing to shard
                shape = (k,) if name[0] == "S" else self._shape(name[0], k)
                empty = torch.empty(*lead, *shape, dtype=dtype, device="meta")
                self.register_parameter(name, nn.Parameter(empty, requires_grad=names is LOW))
        for end, size in zip("UV", self.sizes):
            # All free directions, from before they learn: k_l×k_l is then enough to project (wire.py). A buffer,
            # because FSDP would gather a parameter for forwards that never read it.
            if config.form == "factors" and size == target.rank and 0 < open_ < self.held:
                shape = (*lead, *self._shape(end, open_))
                self.register_buffer(f"{end}_free", dealt(shape, dtype, mesh))

    def _shape(self, end: str, k: int) -> tuple[int, int]:
        size = self.sizes["UV".index(end)]
        return (k, size) if self.turned else (size, k)

    @property
    def high(self) -> Triple | None:
        return self._triple(HIGH) if self.held else None

    @property
    def low(self) -> Triple:
        return self._triple(LOW)

    def _triple(self, names: tuple[str, ...]) -> Triple:
        U, S, V = (getattr(self, name) for name in names)
        return (U.mT, S, V.mT) if self.turned else (U, S, V)

    def side(self, end: str, of: Callable[[nn.Parameter], Tensor | None], basis: str = "") -> Side | None:
        """`of` the low factor at this end, as it is to be projected; None where nothing is held or there is nothing."""
        value = of(getattr(self, f"{end}_low"))
        if value is None or not self.held:
            return None
        inside = basis != "high" and f"{end}_free" in self._buffers
        found = getattr(self, f"{end}_free" if inside else f"{end}_high")
        return Side(value, found, inside=inside, turned=self.turned, kept=None if basis else self.kept.get(end))


class FactoredLinear(Factored):
    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        way = self.compute
        if way == "auto":
            tokens = x.numel() // x.shape[-1]
            way = passes.choose(tokens, *self.sizes, self.held, self.open, torch.is_grad_enabled())
        return passes.linear(x, bias, self.high, self.low, way=way, projected=self.projected)


class FactoredExperts(Factored):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` as it is, and the weight, [E, N, M]. What FSDP frees after the backward of a module it frees when
        the gradient of the module's input has come: without an input that goes through, at the end of everything."""
        with exactly():
            return hidden, passes.weight(self.high, self.low, self.projected, hidden.dtype)


def attach(model: nn.Module, config: "OSFT", site: Site, chosen: Sequence[Target]) -> Applied:
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


def _note(config: "OSFT", own: Mapping[str, Factored]) -> str:
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
        cost=float(target.rank * target.outputs * target.inputs * (target.experts or 1)),
        identity=f"osft factors {factored.held} {factored.turned} {sorted(names)}",
        measured=False,
    )
