"""Random projections R [rows, columns] whose every entry is a function of (seed, name, side, row, column) alone.

Neither rank, device nor shape changes an entry: R of fewer rows or columns is the corner of a larger one. E[RᵀR] = I
for every shape, so that products of projected gradients estimate those of the gradients with one constant, 1, for all
modules, and may be added over modules.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from treering.core.philox import key, words

Side = Literal["inputs", "gradients"]
Distribution = Literal["rademacher", "normal"]


def projection(
    seed: int,
    name: str,
    side: Side,
    rows: int,
    columns: int,
    *,
    distribution: Distribution = "rademacher",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return R, float32.

    Args:
        seed, name, side: what R belongs to; `name` is the canonical name of the module.
        rows: p, what is kept. Entries are divided by √p.
        columns: d, the size of the side.
        distribution: ±1, the same bits on every machine; or normal, the same to float32 rounding.
        device: where R is used. It is made on the CPU.

    Example:
        R = projection(0, "model.layers.0.mlp.up_proj.weight", "inputs", 16, 2048)
    """
    draw = _signs if distribution == "rademacher" else _normal
    return (draw(key(seed, "sketch", name, side, distribution), rows, columns) / math.sqrt(rows)).to(device)


def _signs(of: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Return ±1 [rows, columns]: bit c % 32 of the 32-bit word c // 32 of the row."""
    drawn = words(of, torch.arange(rows), -(-columns // 32))
    bits = (drawn[:, :, None] >> torch.arange(32)) & 1
    return (1 - 2 * bits.flatten(1)[:, :columns]).float()


def _normal(of: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Return normally distributed numbers [rows, columns] by Box and Muller: two words give two neighbours of a row."""
    drawn = words(of, torch.arange(rows), columns + columns % 2).double().unflatten(1, (-1, 2))
    length = (-2 * torch.log((drawn[..., 0] + 1) / 2**32)).sqrt()
    angle = 2 * math.pi / 2**32 * drawn[..., 1]
    both = torch.stack([length * angle.cos(), length * angle.sin()], -1)
    return both.flatten(1)[:, :columns].float()
