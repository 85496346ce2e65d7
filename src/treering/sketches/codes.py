"""Numbers of rows in few bits: int8, int4 and float16 relative to the largest of a document and module, or float32.

A scale is a bfloat16 number: 2 bytes, with the range of float32. As float16, scales of small gradients would vanish.
It is rounded, of int8 up from largest / 127, before anything is divided by it, so that its own rounding loses nothing.
Of int4 it is smaller, where that is closer to all numbers of the row together.
"""

import torch
from torch import Tensor

from treering.sketches.settings import Storage

MOST: dict[Storage, int] = {"int8": 127, "int4": 7, "float16": 1}  # the code of the largest number
CLIPPED = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18)  # scales that are tried for int4, in units of the largest / 7
DTYPES: dict[Storage, torch.dtype] = {
    "int8": torch.int8, "int4": torch.uint8, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip


def width(numbers: int, storage: Storage) -> int:
    """Return how many elements of `DTYPES[storage]` hold so many numbers."""
    return -(-numbers // 2) if storage == "int4" else numbers


def encode(x_nD: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Return codes [n, width] and scales [n] of finite rows; of float32 those are `x_nD` itself and 1."""
    x = x_nD.float()
    if storage == "float32":
        return x, x.new_ones(len(x), dtype=torch.bfloat16)
    scales = scales_of(x, MOST[storage])
    if storage == "int4":
        scales = _closest(x, scales)
    units = divided(x, scales)
    if storage == "float16":
        return units.half(), scales
    codes = units.round_().clamp_(-MOST[storage], MOST[storage])
    return (codes.to(torch.int8) if storage == "int8" else _packed(codes)), scales


def decode(codes: Tensor, scales: Tensor, numbers: int, storage: Storage) -> Tensor:
    """Return rows [n, numbers], float32."""
    return units_of(codes, numbers, storage) * scales.float()[:, None]


def units_of(codes: Tensor, numbers: int, storage: Storage, out: Tensor | None = None) -> Tensor:
    """Return codes as numbers [n, numbers], not multiplied by the scales: float32, or in `out`, which is filled."""
    result = codes.new_empty(len(codes), numbers, dtype=torch.float32) if out is None else out
    if storage != "int4":
        return result.copy_(codes)
    result[:, 0::2] = (codes & 15)[:, : -(-numbers // 2)]
    result[:, 1::2] = (codes >> 4)[:, : numbers // 2]
    return result.sub_(8)


def scales_of(x: Tensor, most: int) -> Tensor:
    """Return, of each row, the smallest bfloat16 number that is not below its largest magnitude / most."""
    wanted = x.abs().amax(1) / most if x.shape[1] else x.new_zeros(len(x))
    rounded = wanted.bfloat16()
    # The bits of a positive float, read as an integer, are in the order of the floats.
    bits = rounded.view(torch.int16) + (rounded.float() < wanted)
    return bits.view(torch.bfloat16)


def divided(x: Tensor, scales: Tensor) -> Tensor:
    """Return rows divided by their scales; a row of zeros stays one."""
    scales = scales.float()
    return x / torch.where(scales > 0, scales, 1)[:, None]


def _closest(x: Tensor, scales: Tensor) -> Tensor:
    """Return, of each row, the scale out of some smaller ones whose int4 codes are closest to it.

    Most numbers of a gradient are far below its largest: with 15 codes it is better to clip a few of them.
    """
    best, least = scales, torch.full_like(x[:, 0], torch.inf)
    for part in CLIPPED:
        tried = (scales.float() * part).bfloat16()
        codes = divided(x, tried).round_().clamp_(-MOST["int4"], MOST["int4"])
        # Relative to the scale of the row, as squares of small numbers vanish.
        error = (codes.mul_(part).sub_(divided(x, scales))).square_().sum(1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _packed(codes: Tensor) -> Tensor:
    """Return two codes of −7 to 7 a byte, plus 8, the first in the low bits."""
    plain = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).add_(8).to(torch.uint8)
    return plain[:, 0::2] | (plain[:, 1::2] << 4)
