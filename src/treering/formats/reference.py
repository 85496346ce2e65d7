"""The value of one weight at a time, in plain Python floats: what `decode` is compared with."""

import math
import struct

import torch
from torch import Tensor


def e4m3(byte: int) -> float:
    """Return the value of an e4m3 byte: sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinity."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    """Return the value of a 4-bit float: sign, 2 exponent bits with bias 1, 1 mantissa bit."""
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def float32(four_bytes: Tensor) -> float:
    return struct.unpack("<f", bytes(four_bytes.tolist()))[0]


def nibble(row: Tensor, column: int, *, high_first: bool = False) -> int:
    byte = int(row[column // 2])
    return byte >> 4 if (column % 2 == 0) == high_first else byte & 15


def bits_at(row: Tensor, first: int, count: int) -> int:
    """Return `count` bits of a little-endian stream."""
    return sum((int(row[i // 8]) >> i % 8 & 1) << i - first for i in range(first, first + count))


def mxfp4(tensors: dict[str, Tensor], i: int, j: int) -> float:
    return e2m1(nibble(tensors["codes"][i], j)) * 2.0 ** (int(tensors["scales"][i, j // 32]) - 127)


def nvfp4(tensors: dict[str, Tensor], i: int, j: int, *, multiply: bool = False, parts: int = 1) -> float:
    part = i // (len(tensors["codes"]) // parts)
    whole, scale = float32(tensors["global"][part]), e4m3(int(tensors["scales"][i, j // 16]))
    # The product of the scales is rounded to float32 before it meets the code.
    step = torch.tensor(scale * whole if multiply else scale / whole, dtype=torch.float32).item()
    return e2m1(nibble(tensors["codes"][i], j)) * step


def integer(tensors: dict[str, Tensor], i: int, j: int, *, width: int, group: int) -> float:
    q = bits_at(tensors["codes"][i], j * width, width) - (1 << width - 1)
    if "zeros" in tensors:
        q -= int(tensors["zeros"][i, j // group].view(torch.int8))
    at = 4 * (j // group)
    return q * float32(tensors["scales"][i, at : at + 4])


def fp8_block(tensors: dict[str, Tensor], i: int, j: int, *, block: int) -> float:
    at = 4 * (j // block)
    return e4m3(int(tensors["codes"][i, j])) * float32(tensors["scales"][i // block, at : at + 4])
