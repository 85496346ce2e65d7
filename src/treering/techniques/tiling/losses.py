"""Functions of logits that never exist as a whole: cross-entropy, distillation, log-probabilities, values.

N trained tokens, H hidden width, V vocabulary. `head` is the module that makes logits of hidden states, adapters and
all; softcap · tanh(scale · head(h) / softcap) is what the losses see. Everything after the head is in float32 or wider.

    -100 as a target: that token is not trained, gives 0 and has no gradient
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.techniques.tiling.region import Region

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Head:
    """What stands between hidden states and logits. `forward`: where it is not the module's own any more."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    forward: Callable[[Tensor], Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        z = (self.forward or self.module)(hidden)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class Tiled:
    """The functions below for one head, `size` tokens at a time. `wide`: see `tile`."""

    def __init__(self, head: Head, *, name: str = "head", setting: str = "tiledloss"):
        self.head, self.region = head, Region(name, [head.module], setting)

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        size: int,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        wide: bool = True,
    ) -> Tensor:
        """Σ over tokens of −log p(target), and of z_loss · (log Σ exp z)². hidden […, H], targets […]."""

        def fn(h: Tensor, t: Tensor) -> Tensor:
            z = self.head.logits(h)
            loss = F.cross_entropy(z, t, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
            if z_loss:
                loss = loss + z_loss * (z.logsumexp(-1).square() * (t != IGNORED)).sum()
            return loss

        return self._run(fn, *_flat(hidden, targets), size=size, out="sum", wide=wide)

    def distillation(
        self,
        hidden: Tensor,
        teacher: Head,
        teacher_hidden: Tensor,
        targets: Tensor,
        *,
        size: int,
        temperature: float = 1.0,
        reverse: bool = False,
        wide: bool = True,
    ) -> Tensor:
        """Σ over trained tokens of T² · KL(teacher ‖ student), or of (student ‖ teacher) if `reverse`.

        Logits of both are made tile by tile; the teacher has no gradient. T²: gradients as large as at T = 1.
        """

        def fn(h: Tensor, other: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                q = F.log_softmax(teacher.logits(other) / temperature, -1)
            p = F.log_softmax(self.head.logits(h) / temperature, -1)
            first, second = (p, q) if reverse else (q, p)
            each = (first.exp() * (first - second)).sum(-1)
            return temperature**2 * each.masked_fill(t == IGNORED, 0.0).sum()

        hidden, targets = _flat(hidden, targets)
        other = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
        return self._run(fn, hidden, other, targets, size=size, out="sum", wide=wide)

    def log_probabilities(self, hidden: Tensor, targets: Tensor, *, size: int, wide: bool = True) -> Tensor:
        """log p(target) of each token, in the shape of `targets`; 0 where that is -100."""

        def fn(h: Tensor, t: Tensor) -> Tensor:
            return -F.cross_entropy(self.head.logits(h), t, ignore_index=IGNORED, reduction="none")

        return self._run(fn, *_flat(hidden, targets), size=size, out="cat", wide=wide).view(targets.shape)

    def values(self, hidden: Tensor, *, size: int, wide: bool = True) -> Tensor:
        """What a value or reward head gives for each token: its outputs as they are, [..., outputs]."""
        found = self._run(self.head.logits, hidden.reshape(-1, hidden.shape[-1]), size=size, out="cat", wide=wide)
        return found.view(*hidden.shape[:-1], *found.shape[1:])

    def _run(self, fn: Callable[..., Any], *tokens: Tensor, size: int, out: Any, wide: bool) -> Any:
        return self.region(fn, *tokens, size=size, out=out, wide=wide)


def _flat(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
