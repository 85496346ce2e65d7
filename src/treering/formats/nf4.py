"""nf4, bitsandbytes' 4-bit table, with its scales quantized a second time.

    w = table[code] · absmax            absmax of a block of 64 inputs
    absmax = map[code₂] · absmax₂ + offset          256 blocks to one absmax₂, offset the mean over the matrix

bitsandbytes blocks the flattened matrix; where the inputs are a multiple of 64 its blocks lie within rows, and the
matrix can be cut by rows.
"""

import struct
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from treering.formats import fused
from treering.formats.bits import as_bytes, constant, from_bytes, pack_nibbles
from treering.formats.layout import Format, Piece, Tensors, grouped, largest, not_divisible

# The quantiles of a normal distribution that bitsandbytes ships, exact in float32.
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def nested_map() -> tuple[float, ...]:
    """Return the 256 values to which scales are rounded: seven decades, each with twice the steps of the one below.

    In Python's floats, rounded to float32 where bitsandbytes' torch code rounds: where memory is planned, tensors have
    no values, and what is computed there would be kept.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade
        step = _float32((1 - _float32(0.1)) / steps)
        up = [_float32(_float32(0.1) + step * i) for i in range((steps + 1) // 2)]
        edges = up + [_float32(1 - step * (steps - i)) for i in range(len(up), steps + 1)]
        scale = _float32(10.0 ** (decade - 6))
        middles = [_float32(scale * (_float32(low + high) / 2)) for low, high in pairwise(edges)]
        values += middles + [-m for m in middles]
    return tuple(sorted(values))


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def nearest(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return as uint8 the index of the nearest of the sorted `values`; ties go to the lower one."""
    table = constant(values, x.device)
    return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class NF4(Format):
    """nf4 codes, 64 inputs to one scale: 4.13 bits a weight with `nested` scales, else 4.5.

    Attributes:
        block: inputs that share a scale.
        nested: whether the scales are quantized to 8 bits (double quantization).
    """

    name: ClassVar[str] = "nf4"
    nested_block: ClassVar[int] = 256
    block: int = 64
    nested: bool = True

    def refusal(self, rows: int, columns: int) -> str:
        return not_divisible(self.name, columns, self.block)

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        codes, blocks = Piece(shape=(rows, columns // 2)), columns // self.block
        if not self.nested:
            return {"codes": codes, "scales": Piece(shape=(rows, 4 * blocks))}
        nested = -(-rows * blocks // self.nested_block)
        return {
            "codes": codes,
            "scales": Piece(shape=(rows, blocks)),
            "nested": Piece(shape=(nested, 4), by_rows=False),
            "offset": Piece(shape=(1, 4), by_rows=False),
        }

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns // self.block

    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0) -> dict[str, Tensor]:
        x = grouped(weight.float(), self.block)
        absmax = largest(x, clip)  # [..., rows, blocks]
        # A block of zeros is divided by one: its code is that of 0, and its scale stays 0.
        inverse = torch.where(absmax == 0, 1.0, 1 / absmax)
        packed = pack_nibbles(nearest(x * inverse[..., None], TABLE).flatten(-2), high_first=True)
        if not self.nested:
            return {"codes": packed, "scales": as_bytes(absmax)}
        # In float64, so that the order in which a device adds does not show in the float32 result.
        offset = absmax.double().mean((-2, -1), keepdim=True).float()
        flat = (absmax - offset).flatten(-2)
        blocks = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % self.nested_block))
        blocks = grouped(blocks, self.nested_block)
        nested = blocks.abs().amax(-1, keepdim=True)
        codes = nearest(blocks / torch.where(nested == 0, 1.0, nested), nested_map())
        return {
            "codes": packed,
            "scales": codes.flatten(-2)[..., : flat.shape[-1]].reshape(absmax.shape),
            "nested": as_bytes(nested),
            "offset": as_bytes(offset),
        }

    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        table = constant(TABLE, tensors["codes"].device)
        return fused.nibbles(tensors["codes"], table, self.scales(tensors), True, dtype)

    def damage(self, tensors: Tensors) -> str:
        floats = ("nested", "offset") if self.nested else ("scales",)
        stored = [from_bytes(tensors[key], torch.float32) for key in floats if key in tensors]
        finite = all(bool(scales.isfinite().all()) for scales in stored)
        return "" if finite else "a scale of nf4 is not finite"

    def scales(self, tensors: Tensors) -> Tensor:
        """Return the scale of each block in float32, [..., rows, blocks]."""
        if not self.nested:
            return from_bytes(tensors["scales"], torch.float32)
        codes = tensors["scales"]
        scales = constant(nested_map(), codes.device)[codes.int()]
        nested, offset = (from_bytes(tensors[key], torch.float32) for key in ("nested", "offset"))
        blocks = codes.shape[-2] * codes.shape[-1]
        by_block = nested.squeeze(-1).repeat_interleave(self.nested_block, -1)[..., :blocks]
        return scales * by_block.reshape(codes.shape) + offset
