"""Fake quantization as autograd differentiates it: the value of Q(W), the gradient of W."""

import torch
from torch import Tensor

from treering.formats import Format


def straight_through(W: Tensor, form: Format) -> Tensor:
    """Return Q(W) [..., outputs, inputs], whose gradient is passed on to W as it is."""
    with torch.no_grad():
        Q = form.decode(form.encode(W), W.shape[-1], W.dtype)
    return W + (Q - W).detach()


def product(x: Tensor, W: Tensor, form: Format) -> Tensor:
    """Return x Q(W)ᵀ."""
    return x @ straight_through(W, form).mT
