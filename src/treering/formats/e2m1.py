"""The 4-bit float E2M1 (mxfp4, nvfp4) and the power-of-two scale E8M0.

A code is sign (bit 3), exponent (bits 2, 1) and mantissa (bit 0): 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives.
"""

import torch
from torch import Tensor

from treering.formats.bits import constant

LARGEST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)  # between an odd and an even code, where the even one is the larger


def e2m1_table(device: torch.device) -> Tensor:
    """Return the 16 values by code, in float32."""
    return constant((*_MAGNITUDES, *(-m for m in _MAGNITUDES)), device)


def e2m1_codes(x: Tensor) -> Tensor:
    """Return the nearest codes as uint8: ties to the even code, larger values saturate, −0.0 keeps its sign."""
    size = x.abs().float().contiguous()  # torch would copy it, with a warning
    code = torch.bucketize(size, constant(_MIDDLES, x.device))
    for tie in _TIES_UP:
        code += size == tie
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def e8m0_values(scales: Tensor) -> Tensor:
    """Return 2^(u − 127) in float32; byte 0 is the subnormal 2^−127, byte 255 is NaN."""
    exponent = scales.int()
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23).int()
    values = bits.view(torch.float32)
    return values.masked_fill(exponent == 255, torch.nan)


def e8m0_scales(amax: Tensor, rounding: str) -> Tensor:
    """Return the byte of the scale under which `amax` (float32, ≥ 0) fits E2M1, or nearly.

    The libraries of the field differ: `even` rounds amax to one mantissa bit first (compressed-tensors), `floor` takes
    its exponent (the OCP text, torchao), `ceil` never saturates (OpenAI's kernel, modelopt).
    """
    if rounding == "ceil":
        bits = (amax / LARGEST).view(torch.int32)
        exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).int()
    else:
        bits = amax.view(torch.int32) + ((1 << 21) if rounding == "even" else 0)
        exponent = (bits >> 23) - 129
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)
