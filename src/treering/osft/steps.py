"""What form `update` does around an optimizer's step."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.optim import Optimizer

from treering.errors import PlanError
from treering.osft.held import Held, Pair, local, project_all
from treering.osft.owners import Owners


class Steps:
    """The weights of one model, and what is held of each."""

    def __init__(
        self, model: nn.Module, weights: Sequence[str], held: Mapping[str, Held], *, anchored: bool, cached: bool
    ):
        self.model, self.weights, self.held, self.anchored = model, tuple(weights), held, anchored
        self.cached = cached
        self._owners: Owners | None = None  # with `cached`: known as soon as weights have been dealt out
        self._old: dict[str, Tensor] = {}
        self._squares: dict[str, tuple[Tensor, Tensor]] = {}  # of this rank's gradient, as it came and projected

    @torch.no_grad()
    def project(self) -> None:
        gradients = {name: local(w.grad) for name, w in self._live() if w.grad is not None}
        raw = {name: _square(gradient) for name, gradient in gradients.items()}
        self._project(gradients)
        self._squares = {name: (raw[name], _square(gradient)) for name, gradient in gradients.items()}

    @torch.no_grad()
    def remember(self, optimizers: Sequence[Optimizer]) -> None:
        """The values from before. Anchored, the optimizer is shown the change instead of the weight: what it decays is
        the change, and never what the model knew."""
        self._check_decay(optimizers)
        for name, weight in self._live():
            if name not in self.held:
                continue
            if self.anchored:
                local(weight).sub_(local(self.held[name].held("before")))
            self._old[name] = local(weight).clone()

    @torch.no_grad()
    def retract(self) -> None:
        values = {name: local(weight) for name, weight in self._live() if name in self.held}
        for name, value in values.items():
            value.sub_(self._old[name])
        self._project(values)
        for name, value in values.items():
            held = self.held[name]
            value.copy_(self._old.pop(name).add_(held.stretch(value)))
            if self.anchored:
                value.add_(local(held.held("before")))

    def _project(self, tensors: Mapping[str, Tensor]) -> None:
        """In place, those that are held."""
        live = dict(self._live())
        pairs = {name: Pair(self.held[name], X, live[name]) for name, X in tensors.items() if name in self.held}
        if not self.cached:
            return project_all(pairs.values())
        if self._owners is None:
            self._owners = Owners(self.held, live)
        return self._owners.project_all(pairs)

    def _check_decay(self, optimizers: Sequence[Optimizer]) -> None:
        if self.anchored:
            return
        mine = {id(weight) for _, weight in self._live()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if group.get("weight_decay") and any(id(p) in mine for p in group["params"]):
                    raise PlanError(
                        f"weight_decay {group['weight_decay']} would draw what the model knew towards zero; set "
                        "osft.anchor to true, so that it acts on the change alone, or weight_decay to 0 "
                        "(torch's AdamW decays by 0.01 if nothing is said)",
                        settings=("techniques.osft.anchor", "train.optimizer.weight_decay"),
                    )

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Norms of the last gradient; and, anchored, ρ = ‖what of ΔW lies where it is held‖ / ‖ΔW‖, the worst. A
        collective."""
        live = dict(self._live())
        norms = [self._norm([(live[n], s[i]) for n, s in self._squares.items()]) for i in (0, 1)]
        found = dict(zip(("osft/raw_norm", "osft/projected_norm"), norms)) if self._squares else {}
        if leaks := self.leaks():
            worst = max(leaks, key=lambda name: leaks[name])
            found |= {"osft/leak": leaks[worst]}
        return found

    @torch.no_grad()
    def leaks(self) -> dict[str, float]:
        """ρ of each weight that is held hard and anchored; 0 for one that has not moved."""
        found = {}
        for names in self._few_at_a_time():
            changes = {name: local(weight) - local(self.held[name].held("before")) for name, weight in names.items()}
            leaks = {name: change.clone() for name, change in changes.items()}
            self._project(leaks)
            for name, weight in names.items():
                parts = changes[name], changes[name] - leaks[name]
                whole, part = (self._norm([(weight, _square(x))]) for x in parts)
                found[name] = part / whole if whole else 0.0
        return found

    def _live(self) -> list[tuple[str, nn.Parameter]]:
        """Looked up each time: sharding has replaced them since the structure was made."""
        return [(name, self.model.get_parameter(name)) for name in self.weights]

    def _norm(self, squares: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The 2-norm of tensors that lie as their parameters do, from this rank's sums of squares."""
        total = torch.stack([square for _, square in squares]).sum()
        like = squares[0][0]
        for axis, placement in enumerate(like.placements if isinstance(like, DTensor) else ()):
            if isinstance(placement, ShardPlacement):
                dist.all_reduce(total, group=like.device_mesh.get_group(axis))  # type: ignore[attr-defined]
        return float(total.sqrt())


def _square(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value).double().square()
