"""The projections of the factored forms around an optimizer's step, and metrics.

In form `factors`, gradients before the step and parameters after it stay orthogonal to what is protected. Form
`forward` projects inside the forward and has only metrics here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treering.core.errors import PlanError
from treering.core.seeds import generator
from treering.core.sharded import Groups, local, local_rows, row_groups, sum_of_squares, sum_over_groups
from treering.technique import Message, Workload
from treering.techniques.osft import traffic
from treering.techniques.osft.forward_factors.communication import Projection, project_

PROBES = 8  # random directions in which leaks are estimated

Summand = tuple[Groups, Tensor]  # a small tensor, and the process groups over which it is summed


class FactoredWeight(Protocol):
    """The part of `Factored` that is used here."""

    projected: bool

    def projection(
        self, end: str, of: Callable[[nn.Parameter], Tensor | None], basis: str = ""
    ) -> Projection | None: ...
    def get_parameter(self, target: str) -> nn.Parameter: ...


class FactorSteps:
    """The factored weights of a model, by the names of their modules."""

    def __init__(self, factored: Mapping[str, FactoredWeight]):
        self.factored = dict(factored)
        self._groups: list[Groups] = []  # of each gradient; and its ‖·‖², raw and projected
        self._squares: tuple[list[Tensor], list[Tensor]] = [], []

    @torch.no_grad()
    def project(self) -> None:
        """Project the gradients in place."""
        gradients = [p.grad for p in self._low() if p.grad is not None]
        raw = [sum_of_squares([g]) for g in gradients]
        project_(self._projections(lambda p: p.grad))
        self._groups = [row_groups(g) for g in gradients]
        self._squares = raw, [sum_of_squares([g]) for g in gradients]

    @torch.no_grad()
    def retract(self) -> None:
        """Project the trained factors in place."""
        project_(self._projections(lambda p: p))

    def before(self, optimizers: Sequence[Optimizer]) -> None:
        refuse_decay(optimizers, self._low())

    def messages(self, work: Workload) -> list[Message]:
        """Return what the projections of a step send, however many micro-batches it has."""
        return traffic.of_factors(self._projections(lambda p: p))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the last gradient's norms, and the largest of `leaks`. A collective of a few kilobytes."""
        values = {}
        if self._groups:
            values = {"osft/raw_norm": self._norm(0), "osft/projected_norm": self._norm(1)}
        if leaks := self.leaks():
            values["osft/leak"] = max(leaks.values())
        return values

    @torch.no_grad()
    def leaks(self) -> dict[str, float]:
        """Return ‖Qᵀ X‖ / ‖X‖ of each trained U and V by name, estimated from a few random directions.

        The factors are taken as the forward takes them: in form `forward`, projected.
        """
        probes = {
            f"{name}.{end}_low": _Probe(projection, factored.projected)
            for name, factored, end, projection in self._every("high")
        }
        for stage in ("draw", "project", "measure", "square"):
            sum_over_groups([message for probe in probes.values() for message in getattr(probe, stage)()])
        return {name: probe.leak for name, probe in probes.items()}

    def _low(self) -> Iterator[nn.Parameter]:
        """Yield the trained factors, looked up each time, because sharding has replaced them."""
        for factored in self.factored.values():
            yield from (factored.get_parameter(name) for name in ("U_low", "S_low", "V_low"))

    def _every(
        self, basis: str = "", of: Callable[[nn.Parameter], Tensor | None] = lambda p: p
    ) -> Iterator[tuple[str, FactoredWeight, str, Projection]]:
        for name, factored in self.factored.items():
            for end in "UV":
                if (projection := factored.projection(end, of, basis)) is not None:
                    yield name, factored, end, projection

    def _projections(self, of: Callable[[nn.Parameter], Tensor | None]) -> Iterator[Projection]:
        return (projection for _, _, _, projection in self._every(of=of))

    def _norm(self, which: int) -> float:
        squares = [(groups, value.clone()) for groups, value in zip(self._groups, self._squares[which])]
        sum_over_groups(squares)
        return float(torch.stack([value for _, value in squares]).sum().sqrt())


class _Probe:
    """Y = X z for a few random z: norms of Y and Qᵀ Y stand for those of X and Qᵀ X, and are small to send.

    Each stage returns what has to be summed over ranks before the next one.
    """

    def __init__(self, projection: Projection, projected: bool):
        self.X, self.Q, self.turned, self.projected = projection.value, projection.basis, projection.turned, projected
        self.groups, self.complete = row_groups(self.X), self.X.ndim == 3 or self.turned

    def draw(self) -> list[Summand]:
        X, k = local(self.X), self.X.shape[0 if self.turned else -1]
        z = torch.randn(k, PROBES, generator=generator(0, "osft", "probe")).to(X)
        if not self.turned:
            self.Y = X @ z
            return []
        start, stop = local_rows(self.X)
        self.Y = X.T @ z[start:stop]
        return [(self.groups, self.Y)]

    def project(self) -> list[Summand]:
        self.C = self._coefficients() if self.projected else None
        return [] if self.C is None or self.complete else [(self.groups, self.C)]

    def measure(self) -> list[Summand]:
        if self.C is not None:
            self.Y = self.Y - local(self.Q).to(self.Y) @ self.C
        self.C = self._coefficients()
        return [] if self.complete else [(self.groups, self.C)]

    def square(self) -> list[Summand]:
        assert self.C is not None
        self.protected, self.total = sum_of_squares([self.C]), sum_of_squares([self.Y])
        # What is the same on all ranks already is not summed again.
        parts = [self.protected] if self.turned else [self.protected, self.total] if self.complete else [self.total]
        return [(self.groups, part) for part in parts]

    @property
    def leak(self) -> float:
        return float((self.protected / self.total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())

    def _coefficients(self) -> Tensor:
        Q = local(self.Q).to(self.Y)
        return Q @ self.Y if self.turned else Q.mT @ self.Y


def refuse_decay(optimizers: Iterable[Optimizer], trained: Iterable[Tensor]) -> None:
    """Refuse weight decay: the trained factors are a part of the base model, and decay would reduce that part."""
    factors = {id(parameter) for parameter in trained}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(p) in factors for p in group["params"]):
                raise PlanError(
                    f"weight_decay {group['weight_decay']} would decay the trainable part of what the model had "
                    "learned: osft's factored forms train that part itself. Set weight_decay to 0, or use form "
                    "update with osft.keep_initial, or form one_sided, where it acts on the change",
                    settings=("train.optimizer.weight_decay", "techniques.osft.form"),
                )
