"""A weight as its singular factors: those that are protected, and those that train."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.full_precision import exactly
from treering.techniques.osft import passes
from treering.techniques.osft.held import dealt
from treering.techniques.osft.targets import Target
from treering.techniques.osft.wire import Kept, Side

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.techniques.osft.settings import OSFTSettings

Triple = tuple[Tensor, Tensor, Tensor]


LOW = ("U_low", "S_low", "V_low")


HIGH = ("U_high", "S_high", "V_high")


class Factored(nn.Module):
    """A weight as factors. In a module of its own, because bases stay in float32 where FSDP casts all around them."""

    def __init__(
        self, config: "OSFTSettings", target: Target, open_: int, dtype: torch.dtype, mesh: "DeviceMesh | None"
    ):
        super().__init__()
        self.sizes = (target.outputs, target.inputs)
        self.held, self.open = target.rank - open_, open_
        self.projected, self.compute = config.form == "forward", config.compute
        self.turned = config.form == "factors" and config.communication != "coefficients" and target.experts is None
        self.kept = {end: Kept() for end in "UV"} if self.turned and config.communication == "cached" else {}
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
