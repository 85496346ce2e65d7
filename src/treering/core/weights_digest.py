"""A digest of a model's weights that is the same however they are sharded.

Σ over elements of (bits of the element) · (an odd number of its place), modulo 2⁶⁴: a sum, so that ranks add theirs up.
It tells weights apart that differ by training; it is no protection against somebody who looks for a collision.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from treering.core.sharded import local, local_rows, settle, sum_over_rows

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_BLOCK = 1 << 22  # elements at a time


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Return the digest of all parameters of a model, by their live names. A collective where they are sharded."""
    settle(model)
    words = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        total = sum_over_rows(_sum(parameter), parameter)
        words.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {int(total)}\n".encode())
    return words.hexdigest()


def _sum(parameter: Tensor) -> Tensor:
    values = local(parameter).contiguous()
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    start, _ = local_rows(parameter)
    first = start * math.prod(parameter.shape[1:])
    bits = values.reshape(-1).view(_BITS[values.element_size()])
    for at in range(0, bits.numel(), _BLOCK):
        block = bits[at : at + _BLOCK].long()
        places = torch.arange(first + at, first + at + block.numel(), device=values.device)
        places = (places * 2 + 1) * _ODD
        total += ((block + 1) * (places ^ (places >> 29) | 1)).sum()
    return total
