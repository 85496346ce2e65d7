"""The projections of form `update` around an optimizer's step, and weight decay that acts on the change.

An optimizer decays W, and with it what the model had learned. Here W − W₀ is decayed instead: where decay is a part
of the gradient (g + w W: SGD, Adam), w W₀ is subtracted from the gradient before the step; where it is apart from it
(W − lr w W: AdamW, Muon), lr w W₀ is added to the step afterwards. In both cases the optimizer sees the weight itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treering.core.errors import PlanError
from treering.core.sharded import local, sum_of_squares, sum_over_rows
from treering.technique import Message, Workload
from treering.techniques.osft import traffic
from treering.techniques.osft.update.cached_operators import CachedOperators
from treering.techniques.osft.update.operator_buffers import OperatorBuffers, ProjectedRows, project_all

APART = {"AdamW", "Muon", "Adafactor"}
WITHIN = {"SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"}


class UpdateSteps:
    """The trained weights of one model, and their operators.

    Args:
        weights: names of all trained weights.
        operators: those that have operators, or a weight from before training.
        keep_initial: the weights from before training are kept.
        cached: one rank keeps a weight's complete operators (`CachedOperators`).
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[str],
        operators: Mapping[str, OperatorBuffers],
        *,
        keep_initial: bool,
        cached: bool,
    ):
        self.model, self.weights, self.operators = model, tuple(weights), operators
        self.keep_initial, self.cached = keep_initial, cached
        self._cache: CachedOperators | None = None  # created at first use, when weights have been sharded
        self._old: dict[str, Tensor] = {}
        self._undecay: dict[str, float] = {}  # how much of W₀ the optimizer subtracts and `retract` adds again
        self._squares: dict[str, tuple[Tensor, Tensor]] = {}  # ‖·‖² of this rank's gradient, raw and projected

    @torch.no_grad()
    def project(self) -> None:
        """Project the gradients in place."""
        gradients = {name: local(w.grad) for name, w in self._live() if w.grad is not None}
        raw = {name: sum_of_squares([gradient]) for name, gradient in gradients.items()}
        self._project(gradients)
        self._squares = {name: (raw[name], sum_of_squares([gradient])) for name, gradient in gradients.items()}

    @torch.no_grad()
    def remember(self, optimizers: Sequence[Optimizer]) -> None:
        """Copy the weights as they are before the step, and make decay act on the change."""
        live = {name: weight for name, weight in self._live() if name in self.operators}
        self._undecay = {}
        for name, (rate, apart) in decays(optimizers, live, keep_initial=self.keep_initial).items():
            if apart:
                self._undecay[name] = rate
            elif live[name].grad is not None:
                local(live[name].grad).sub_(self._before(name), alpha=rate)  # type: ignore[arg-type]
        self._old = {name: local(weight).clone() for name, weight in live.items() if weight.grad is not None}

    @torch.no_grad()
    def retract(self) -> None:
        """Replace the optimizer's step Δ by c · P_out Δ P_in."""
        values = {name: local(weight) for name, weight in self._live() if name in self._old}
        for name, value in values.items():
            value.sub_(self._old[name])
            if name in self._undecay:
                value.add_(self._before(name), alpha=self._undecay[name])
        self._project(values)
        for name, value in values.items():
            value.copy_(self._old[name].add_(self.operators[name].stretch(value)))
        self._old = {}

    def _before(self, name: str) -> Tensor:
        """Return this rank's rows of the weight as it was before training."""
        return local(self.operators[name].buffer("before")).to(local(self.model.get_parameter(name)).device)

    def _project(self, tensors: Mapping[str, Tensor]) -> None:
        """Project in place those that have operators."""
        live = dict(self._live())
        tasks = {n: ProjectedRows(self.operators[n], X, live[n]) for n, X in tensors.items() if n in self.operators}
        if cache := self._cached():
            cache.project_all(tasks)
        else:
            project_all(tasks.values())

    def _cached(self) -> CachedOperators | None:
        if self.cached and self._cache is None:
            self._cache = CachedOperators(self.operators, dict(self._live()))
        return self._cache

    def messages(self, work: Workload) -> list[Message]:
        """Return what the projections of a step send, however many micro-batches it has."""
        return traffic.of_update(dict(self._live()), self.operators, self._cached())

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the norms of the last gradient, and the largest of `leaks`. A collective."""
        live = dict(self._live())
        values = {}
        for i, name in enumerate(("osft/raw_norm", "osft/projected_norm") if self._squares else ()):
            values[name] = self._norm([(live[n], squares[i]) for n, squares in self._squares.items()])
        if leaks := self.leaks():
            values["osft/leak"] = max(leaks.values())
        return values

    @torch.no_grad()
    def leaks(self) -> dict[str, float]:
        """Return ρ = ‖the protected part of ΔW‖ / ‖ΔW‖ of each weight that has hard protection and whose initial values
        are kept; 0 for one that has not changed. A collective."""
        leaks = {}
        for names in self._measured():
            changes = {name: local(weight) - self._before(name) for name, weight in names.items()}
            projected = {name: change.clone() for name, change in changes.items()}
            self._project(projected)
            for name, weight in names.items():
                parts = changes[name], changes[name] - projected[name]
                total, protected = (self._norm([(weight, sum_of_squares([x]))]) for x in parts)
                leaks[name] = protected / total if total else 0.0
        return leaks

    def _measured(self) -> Iterator[dict[str, nn.Parameter]]:
        """Yield a few weights at a time, because their changes are copied: one round of exchanges, else one weight."""
        live = {n: w for n, w in self._live() if self.keep_initial and n in self.operators and self.operators[n].hard}
        cache = self._cached()
        for names in list(cache.rounds(live)) if cache else ():
            yield {name: live.pop(name) for name in names}
        for name, weight in live.items():
            yield {name: weight}

    def _live(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters, looked up each time, because sharding has replaced them."""
        return [(name, self.model.get_parameter(name)) for name in self.weights]

    def _norm(self, squares: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return the 2-norm of tensors that are sharded as their parameters are, from this rank's sums of squares."""
        total = torch.stack([square for _, square in squares]).sum()
        return float(sum_over_rows(total, squares[0][0]).sqrt())


def decays(
    optimizers: Sequence[Optimizer], weights: Mapping[str, nn.Parameter], *, keep_initial: bool
) -> dict[str, tuple[float, bool]]:
    """Return (rate, whether it is apart from the gradient) of each weight that is about to be decayed.

    Weights without a gradient are not stepped, and not decayed. Where the weights from before training are not kept,
    decay is an error.
    """
    names = {id(weight): name for name, weight in weights.items()}
    rates: dict[str, tuple[float, bool]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decayed = [names[id(p)] for p in group["params"] if id(p) in names and p.grad is not None]
            if not group.get("weight_decay") or not decayed:
                continue
            if not keep_initial:
                raise PlanError(
                    f"weight_decay {group['weight_decay']} would decay what the model had learned; set "
                    "osft.keep_initial to true, so that it acts on the change alone, or weight_decay to 0 "
                    "(torch's AdamW decays by 0.01 by default)",
                    settings=("techniques.osft.keep_initial", "train.optimizer.weight_decay"),
                )
            apart = _apart(optimizer, group)
            rate = float(group["weight_decay"]) * (float(group["lr"]) if apart else _gradient_factor(optimizer, group))
            rates |= dict.fromkeys(decayed, (rate, apart))
    return rates


def _gradient_factor(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return what a gradient is multiplied by after this: decay is added to −g where an objective is maximized, and a
    gradient scaler leaves it to a fused optimizer to divide g by its scale."""
    scale = getattr(optimizer, "grad_scale", None)
    return (-1.0 if group.get("maximize") else 1.0) * (1.0 if scale is None else float(scale))


def _apart(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    name = type(optimizer).__name__
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    if name not in APART | WITHIN:
        raise PlanError(
            f"how {name} decays weights is not known, so it cannot be made to act on the change alone; set "
            f"weight_decay to 0, or use one of {', '.join(sorted(APART | WITHIN))}"
        )
    return name in APART
