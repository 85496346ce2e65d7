"""The reference: keep the input of each block, and run each block again to find its gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def forward_and_backward(
    blocks: Sequence[Callable[[Tensor], Tensor]], x: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (output, gradient of x) for a gradient of the output; those of weights are added to `.grad`."""
    inputs = []
    with torch.no_grad():
        for block in blocks:
            inputs.append(x)
            x = block(x)
    for block, kept in zip(reversed(blocks), reversed(inputs)):
        kept = kept.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(block(kept), gradient)
        assert kept.grad is not None
        gradient = kept.grad
    return x, gradient
