"""What the factored forms do around an optimizer's step: gradients before it and parameters after it stay orthogonal
to what is held (`factors`; `forward` projects inside the forward and has nothing to do), and how well they do."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treering.core.errors import PlanError
from treering.core.seeds import generator
from treering.core.sharded import local
from treering.technique import Message, Workload
from treering.techniques.osft.traffic import of_factors
from treering.techniques.osft.wire import Side, first_row, groups, project_, sum_together

if TYPE_CHECKING:
    from treering.techniques.osft.factored import Factored

PROBES = 8


class Steps:
    """The factored weights of a model, by the names of their modules."""

    def __init__(self, own: "Mapping[str, Factored]"):
        self.own = dict(own)
        self._ranks: list[tuple[Any, ...]] = []  # of each gradient, and its ‖·‖² as it came and projected
        self._squares: tuple[list[Tensor], list[Tensor]] = [], []

    @torch.no_grad()
    def project(self) -> None:
        gradients = [p.grad for p in self._low() if p.grad is not None]
        raw = [_square(g) for g in gradients]
        project_(self._sides(lambda p: p.grad))
        self._ranks = [groups(g) for g in gradients]
        self._squares = raw, [_square(g) for g in gradients]

    @torch.no_grad()
    def retract(self) -> None:
        project_(self._sides(lambda p: p))

    def before(self, optimizers: Sequence[Optimizer]) -> None:
        refuse_decay(optimizers, self._low())

    def messages(self, work: Workload) -> list[Message]:
        """Return what the projections of a step send, however many micro-batches it has."""
        return of_factors(self._sides(lambda p: p))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The last gradient's norms, and how much of the learning factors lies where it is held: the worst
        ‖Qᵀ X‖ / ‖X‖ of any U_l or V_l, estimated from a few random directions. A collective of a few kilobytes."""
        found = {}
        if self._ranks:
            found = {"osft/raw_norm": self._norm(0), "osft/projected_norm": self._norm(1)}
        if leaks := self.leaks():
            found["osft/leak"] = max(leaks.values())
        return found

    @torch.no_grad()
    def leaks(self) -> dict[str, float]:
        """By the factor's name. The factors as the forward takes them: projected, in form `forward`."""
        thin = {f"{name}.{end}_low": _Thin(side, own.projected) for name, own, end, side in self._every("high")}
        for stage in ("draw", "hold", "look", "measure"):
            sum_together([own for one in thin.values() for own in getattr(one, stage)()])
        return {name: one.leak for name, one in thin.items()}

    def _low(self) -> Iterator[nn.Parameter]:
        """Looked up each time: sharding has replaced them since the structure was made."""
        for own in self.own.values():
            yield from (own.get_parameter(name) for name in ("U_low", "S_low", "V_low"))

    def _every(self, basis: str = "", of: Callable[[nn.Parameter], Tensor | None] = lambda p: p) -> Iterator[Any]:
        for name, own in self.own.items():
            for end in "UV":
                if (side := own.side(end, of, basis)) is not None:
                    yield name, own, end, side

    def _sides(self, of: Callable[[nn.Parameter], Tensor | None]) -> Iterator[Side]:
        return (side for _, _, _, side in self._every(of=of))

    def _norm(self, which: int) -> float:
        squares = [(over, value.clone()) for over, value in zip(self._ranks, self._squares[which])]
        sum_together(squares)
        return float(torch.stack([value for _, value in squares]).sum().sqrt())


class _Thin:
    """Y = X z for a few random z: norms of Y and Qᵀ Y stand for those of X and Qᵀ X and are next to nothing to send."""

    def __init__(self, side: Side, projected: bool):
        self.X, self.Q, self.turned, self.projected = side.value, side.basis, side.turned, projected
        self.over, self.whole = groups(side.value), side.value.ndim == 3 or side.turned

    def draw(self) -> list[tuple[tuple[Any, ...], Tensor]]:
        X, k = local(self.X), self.X.shape[0 if self.turned else -1]
        z = torch.randn(k, PROBES, generator=generator(0, "osft", "probe")).to(X)
        if not self.turned:
            self.Y = X @ z
            return []
        start = first_row(self.X)
        self.Y = X.T @ z[start : start + X.shape[0]]
        return [(self.over, self.Y)]

    def hold(self) -> list[tuple[tuple[Any, ...], Tensor]]:
        self.C = self._coefficients() if self.projected else None
        return [] if self.C is None or self.whole else [(self.over, self.C)]

    def look(self) -> list[tuple[tuple[Any, ...], Tensor]]:
        if self.C is not None:
            self.Y = self.Y - local(self.Q).to(self.Y) @ self.C
        self.C = self._coefficients()
        return [] if self.whole else [(self.over, self.C)]

    def measure(self) -> list[tuple[tuple[Any, ...], Tensor]]:
        assert self.C is not None
        self.inside, self.all = _square(self.C), _square(self.Y)
        # What is already the same on all ranks is not summed again.
        parts = [self.inside] if self.turned else [self.inside, self.all] if self.whole else [self.all]
        return [(self.over, part) for part in parts]

    @property
    def leak(self) -> float:
        return float((self.inside / self.all.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())

    def _coefficients(self) -> Tensor:
        Q = local(self.Q).to(self.Y)
        return Q @ self.Y if self.turned else Q.mT @ self.Y


def _square(value: Tensor) -> Tensor:
    return local(value).double().square().sum()


def refuse_decay(optimizers: Iterable[Optimizer], learning: Iterable[Tensor]) -> None:
    """The learning factors are a part of the base model: decay would draw that part to zero, not the change."""
    mine = {id(parameter) for parameter in learning}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(p) in mine for p in group["params"]):
                raise PlanError(
                    f"weight_decay {group['weight_decay']} would draw the free part of what the model knew towards "
                    "zero: osft's factored forms train that part itself. Set weight_decay to 0, or use form update "
                    "with osft.keep_initial, or form one_sided, where it acts on the change",
                    settings=("train.optimizer.weight_decay", "techniques.osft.form"),
                )
