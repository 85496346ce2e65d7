"""What form `update` does around an optimizer's step."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treering.core.sharded import local, sum_over_rows
from treering.technique import Message, Workload
from treering.techniques.osft.decay import decays
from treering.techniques.osft.held import Held, Pair, project_all
from treering.techniques.osft.owners import Owners
from treering.techniques.osft.traffic import of_update


class Steps:
    """The weights of one model, and what is held of each."""

    def __init__(
        self, model: nn.Module, weights: Sequence[str], held: Mapping[str, Held], *, anchored: bool, cached: bool
    ):
        self.model, self.weights, self.held, self.anchored = model, tuple(weights), held, anchored
        self.cached = cached
        self._owning: Owners | None = None  # with `cached`: chosen at first use, when weights have been dealt out
        self._old: dict[str, Tensor] = {}
        self._undecay: dict[str, float] = {}  # how much of the weight from before the optimizer takes away too much
        self._squares: dict[str, tuple[Tensor, Tensor]] = {}  # of this rank's gradient, as it came and projected

    @torch.no_grad()
    def project(self) -> None:
        gradients = {name: local(w.grad) for name, w in self._live() if w.grad is not None}
        raw = {name: _square(gradient) for name, gradient in gradients.items()}
        self._project(gradients)
        self._squares = {name: (raw[name], _square(gradient)) for name, gradient in gradients.items()}

    @torch.no_grad()
    def remember(self, optimizers: Sequence[Optimizer]) -> None:
        """The values from before, and how strongly each is about to be decayed."""
        live = {name: weight for name, weight in self._live() if name in self.held}
        self._undecay = {}
        for name, (rate, apart) in decays(optimizers, live, anchored=self.anchored).items():
            if apart:
                self._undecay[name] = rate
            elif live[name].grad is not None:
                local(live[name].grad).sub_(self._before(name), alpha=rate)  # type: ignore[arg-type]
        self._old = {name: local(weight).clone() for name, weight in live.items() if weight.grad is not None}

    @torch.no_grad()
    def retract(self) -> None:
        values = {name: local(weight) for name, weight in self._live() if name in self._old}
        for name, value in values.items():
            value.sub_(self._old[name])
            if name in self._undecay:
                value.add_(self._before(name), alpha=self._undecay[name])
        self._project(values)
        for name, value in values.items():
            value.copy_(self._old[name].add_(self.held[name].stretch(value)))
        self._old = {}

    def _before(self, name: str) -> Tensor:
        """The weight as it was before training: decay towards it, and not towards zero, acts on the change."""
        return local(self.held[name].held("before")).to(local(self.model.get_parameter(name)).device)

    def _project(self, tensors: Mapping[str, Tensor]) -> None:
        """In place, those that are held."""
        live = dict(self._live())
        pairs = {name: Pair(self.held[name], X, live[name]) for name, X in tensors.items() if name in self.held}
        if owners := self._owners():
            owners.project_all(pairs)
        else:
            project_all(pairs.values())

    def _owners(self) -> Owners | None:
        if self.cached and self._owning is None:
            self._owning = Owners(self.held, dict(self._live()))
        return self._owning

    def messages(self, work: Workload) -> list[Message]:
        """Return what the projections of a step send, however many micro-batches it has."""
        return of_update(dict(self._live()), self.held, self._owners())

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Norms of the last gradient; and, anchored, ρ = ‖what of ΔW lies where it is held‖ / ‖ΔW‖, the worst. A
        collective."""
        live = dict(self._live())
        found = {}
        for i, name in enumerate(("osft/raw_norm", "osft/projected_norm") if self._squares else ()):
            found[name] = self._norm([(live[n], squares[i]) for n, squares in self._squares.items()])
        if leaks := self.leaks():
            worst = max(leaks, key=lambda name: leaks[name])
            found |= {"osft/leak": leaks[worst]}
        return found

    @torch.no_grad()
    def leaks(self) -> dict[str, float]:
        """ρ of each weight that is held hard and anchored; 0 for one that has not moved."""
        found = {}
        for names in self._measured():
            changes = {name: local(weight) - self._before(name) for name, weight in names.items()}
            leaks = {name: change.clone() for name, change in changes.items()}
            self._project(leaks)
            for name, weight in names.items():
                parts = changes[name], changes[name] - leaks[name]
                whole, part = (self._norm([(weight, _square(x))]) for x in parts)
                found[name] = part / whole if whole else 0.0
        return found

    def _measured(self) -> Iterator[dict[str, nn.Parameter]]:
        """A few at a time, because their changes are copied: what travels together, else one."""
        live = {n: w for n, w in self._live() if self.anchored and n in self.held and self.held[n].hard}
        owners = self._owners()
        for names in owners.rounds(live) if owners else ():
            yield {name: live.pop(name) for name in names}
        for name, weight in live.items():
            yield {name: weight}

    def _live(self) -> list[tuple[str, nn.Parameter]]:
        """Looked up each time: sharding has replaced them since the structure was made."""
        return [(name, self.model.get_parameter(name)) for name in self.weights]

    def _norm(self, squares: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The 2-norm of tensors that lie as their parameters do, from this rank's sums of squares."""
        total = torch.stack([square for _, square in squares]).sum()
        return float(sum_over_rows(total, squares[0][0]).sqrt())


def _square(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value).double().square()
