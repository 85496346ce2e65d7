"""The reference: the results that tiles must give, in a few lines, with everything in memory at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def tiled(fn: Callable[..., Tensor], tokens: Sequence[Tensor], params: Sequence[Tensor], cuts: Sequence[int]) -> Tensor:
    """Return `fn` tile by tile under plain autograd; `cuts` are the lengths of the tiles along dimension 0."""
    return torch.cat([fn(*tile, *params) for tile in zip(*(x.split(list(cuts)) for x in tokens))])


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = scale * F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def cross_entropy(z: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Return Σ over tokens whose target is not -100 of (1 − ε)(−log p_target) + ε · mean over V of −log p, and
    z-loss."""
    real = targets != -100
    z, targets = z[real], targets[real]
    log_p = z - z.logsumexp(-1, keepdim=True)
    each = -(1 - label_smoothing) * log_p[torch.arange(len(targets)), targets] - label_smoothing * log_p.mean(-1)
    return each.sum() + z_loss * z.logsumexp(-1).square().sum()


def divergence(p: Tensor, q: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return Σ over trained tokens of T² · KL(p ‖ q), of the logits p and q."""
    log_p, log_q = (z[targets != -100].div(temperature).log_softmax(-1) for z in (p, q))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
