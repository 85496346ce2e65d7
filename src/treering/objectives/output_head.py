"""The computation from hidden states to logits, of a model that is trained or of a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treering.objectives.objective import widened

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """The computation from hidden states to logits.

    Attributes:
        module: Computes logits, before scale and softcap.
        scale: The factor of its output.
        softcap: c of c · tanh(z / c), applied after the scale.
        forward: Called instead of `module`, where that has a forward that was replaced.
    """

    module: "nn.Module"
    scale: float = 1.0
    softcap: float | None = None
    forward: "Callable[[Tensor], Tensor] | None" = None

    def logits(self, hidden: "Tensor") -> "Tensor":
        """Return logits in float32, or in their own dtype if it is wider."""
        import torch

        z = widened((self.forward or self.module)(hidden))
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
