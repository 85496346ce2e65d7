"""What is held, as operators: of a weight's inputs by measurement, of its ends by its own singular vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.techniques.osft.decompose import eigen, svd
from treering.techniques.osft.moment import moment
from treering.techniques.osft.ranks import OF_WEIGHTS, asked, choices, everywhere, floor, free
from treering.techniques.osft.targets import Target, oriented

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings

End = Literal["in", "out"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """The shape of one operator, known before any weight: Q is size × columns.

    thin: Q is all that is open; else Q is what is held, against a rest that is open.
    """

    end: End
    size: int
    columns: int
    thin: bool
    source: Literal["inputs", "weights"]
    soft: bool = False

    @property
    def whole(self) -> bool:
        """Whether P itself is less to multiply with than Q twice."""
        return 2 * self.columns > self.size

    @property
    def rest(self) -> float:
        return 0.0 if self.thin else 1.0


def sides(config: "OSFTSettings", target: Target) -> tuple[Side, ...]:
    """For projections of a whole weight: whichever way to write each operator has the smaller Q."""
    found = []
    if config.protect != "inputs":
        open_ = open_by_weights(config, target)
        ends: tuple[End, ...] = ("out",) if config.protect == "both" else ("out", "in")
        for end in ends:
            # Only on an end as long as the rank are the free singular vectors all that is free.
            complete = _size(target, end) == target.rank
            found.append(_by_weights(target, end, open_, thin=complete and open_ < target.rank - open_))
    if config.protect != "weights":
        open_ = target.inputs if (every := everywhere(config, target)) else free(config, target)
        thin = every or (config.strength == "hard" and open_ < target.inputs - open_)
        found.append(_by_inputs(config, target, open_, thin=thin))
    return tuple(side for side in found if side.thin or side.columns)


def addend_sides(config: "OSFTSettings", target: Target) -> dict[End, Side]:
    """For an adapter: a basis on one end or on both, so that what trains is small; an operator on the other."""
    found = []
    by_weights, by_inputs = open_by_weights(config, target), free(config, target)
    core, short = config.form == "core", "out" if target.outputs <= target.inputs else "in"
    if config.protect == "inputs":
        found.append(_by_inputs(config, target, by_inputs, thin=True))
    elif config.protect == "weights" and by_weights < target.rank:
        found.append(_by_weights(target, "out", by_weights, thin=core or short == "out"))
        found.append(_by_weights(target, "in", by_weights, thin=core or short == "in"))
    elif config.protect == "both":
        found.append(_by_weights(target, "out", by_weights, thin=core or short == "out"))
        found.append(_by_inputs(config, target, by_inputs, thin=core or short == "in"))
    return {side.end: side for side in found if side.thin or side.columns}


def open_by_weights(config: "OSFTSettings", target: Target) -> int:
    """Free singular directions. Under `both` a number is counted in inputs, and taken in proportion."""
    if config.protect == "both" and asked(config, target) is None and target.weight not in config.free:
        return max(1, floor(OF_WEIGHTS, target.rank))
    # At least one: a weight of which nothing is free is not trained at all.
    return min(target.rank, max(1, free(config, target) * target.rank // choices(config, target)))


def _size(target: Target, end: End) -> int:
    return target.outputs if end == "out" else target.inputs


def _by_weights(target: Target, end: End, open_: int, *, thin: bool) -> Side:
    columns = open_ if thin else target.rank - open_
    return Side(end=end, size=_size(target, end), columns=columns, thin=thin, source="weights")


def _by_inputs(config: "OSFTSettings", target: Target, open_: int, *, thin: bool) -> Side:
    columns = open_ if thin else target.inputs - open_
    return Side(
        end="in", size=target.inputs, columns=columns, thin=thin, source="inputs", soft=config.strength == "soft"
    )


Made = Mapping[End, tuple[Tensor, Tensor]]


def operators(
    chosen: Sequence[Side],
    target: Target,
    damping: float,
    weight: Callable[[], Tensor],
    statistics: Mapping[str, Tensor] | None,
) -> Made:
    """(Q, values) of each side. `weight` is read only if its singular vectors are asked for."""
    made: dict[End, tuple[Tensor, Tensor]] = {}
    factors = None
    for side in chosen:
        if side.source == "inputs":
            made[side.end] = from_inputs(side, damping, moment(target, statistics))
            continue
        factors = factors or svd(oriented(finite(weight(), target), target))
        Q = _columns(side, factors[0] if side.end == "out" else factors[2])
        made[side.end] = Q, torch.full(Q.shape[:-2] + Q.shape[-1:], 1.0 - side.rest, dtype=Q.dtype)
    return made


def finite(W: Tensor, target: Target) -> Tensor:
    if not bool(torch.isfinite(W).all()):
        raise PlanError(f"osft: {target.weight} has values that are not finite, and no singular vectors to hold")
    return W


def from_inputs(side: Side, damping: float, A: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of measured inputs, most used first. Soft: open by 1 / (e/ē + λ), in proportion to the most open."""
    energy, basis = eigen(A)
    Q, own = _columns(side, basis), _columns(side, energy[..., None, :])[..., 0, :]
    mean = energy.mean(-1, keepdim=True)
    values = torch.full_like(own, 1.0 - side.rest)
    if side.soft:
        others = energy[..., side.columns :]
        last = own[..., -1:] if side.thin or not others.shape[-1] else others.mean(-1, keepdim=True)
        unit = torch.where(mean > 0, mean, torch.ones_like(mean))
        values = ((last / unit + damping) / (own / unit + damping)).clamp(max=1.0)
    # Where nothing was measured (an expert that saw no token) nothing is held.
    return Q, torch.where(mean > 0, values, torch.ones_like(values))


def _columns(side: Side, basis: Tensor) -> Tensor:
    """The open ones are the last, where a spectrum is least; the held ones the first."""
    return basis[..., basis.shape[-1] - side.columns :] if side.thin else basis[..., : side.columns]


def scale(chosen: Sequence[Side], made: Made, target: Target, frozen: Tensor | None = None) -> Tensor:
    """1 / root mean square eigenvalue: a step that points everywhere alike keeps its length, so that the learning rate
    of one protection serves another. [1], or one an expert. 0 for those that are `frozen`."""
    found = torch.ones(target.experts or 1, dtype=torch.float64)
    for side in chosen:
        _, values = made[side.end]
        square = values.double().square().sum(-1) + (side.size - side.columns) * side.rest**2
        found = found * (square / side.size).clamp_min(1e-30).rsqrt()
    return found if frozen is None else found.masked_fill(frozen, 0.0)


def cost(chosen: Sequence[Side], target: Target) -> float:
    """Multiplications of what `operators` will decompose, in proportion."""
    one = sum(float(side.size) ** 3 for side in chosen if side.source == "inputs")
    if any(side.source == "weights" for side in chosen):
        one += float(target.rank * target.outputs * target.inputs)
    return one * (target.experts or 1)


def identity(config: "OSFTSettings", chosen: Sequence[Side]) -> str:
    """What the decomposed bases depend on besides the weight and the statistics."""
    freeze = " freeze" if config.unmeasured == "freeze" else ""
    return f"osft {config.form} soften {config.damping} {tuple(chosen)!r}{freeze}"
