"""The arithmetic of the codecs, on whole tensors: plain torch on the CPU, one or two kernels on a card.

Shapes: R rows of tokens, H heads, D width of a head; H_DD is the Hadamard matrix.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from treering.formats.bits import divided
from treering.formats.float8 import LARGEST

_CODES = 127  # int8 without −128
SMALLEST = 2.0**-149  # of float32; added to a scale, it rounds a subnormal one up, so that no code exceeds its range
_LARGEST_VALUE = (2 - 2**-22) * 2.0**127  # a little below float32's, so that a code times its scale is finite


def rotation_block(width: int) -> int:
    """Return the largest power of two that divides a head width."""
    return width & -width


def hadamard(width: int, device: torch.device) -> Tensor:
    """Return H [width, width] in float32: entries ±1, in blocks of the largest power of two, H H = block · 1."""
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return _hadamard(width).to(device)
    return _kept_hadamard(width, device)


@cache
def _kept_hadamard(width: int, device: torch.device) -> Tensor:
    return _hadamard(width).to(device)


def _hadamard(width: int) -> Tensor:
    block = rotation_block(width)
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix] * (width // block))


def _scale(reach: Tensor, codes: float) -> Tensor:
    """Return the scale of rows whose largest absolute value is `reach`; NaN where that is not finite."""
    scale = (divided(reach, codes) + SMALLEST).clamp(max=_LARGEST_VALUE / codes)
    return torch.where(reach < math.inf, scale, math.nan)


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale, or 1 where a processor that flushes subnormal numbers has made it 0."""
    return torch.where(scale > 0, scale, 1.0)


def write_e4m3(x_RHD: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales."""
    x = x_RHD.float()
    scale = _scale(x.abs().amax(-1, keepdim=True), LARGEST)
    # clamped: before torch 2.13 a value over 448 became NaN
    return (x / _divisor(scale)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def read_e4m3(codes_RHD: Tensor, scales_RH1: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    values = table.index_select(0, codes_RHD.flatten().int()).view(codes_RHD.shape)
    return (values * scales_RH1).to(dtype)


def rotate(x_RHD: Tensor, H_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotated rows, and the mean of those that are finite in bfloat16.

    By itself: one kernel with `write_int8` would subtract a mean that is not rounded as the one that is sent.
    """
    # divided by a power of two before the sums: exact, and no sum can exceed the largest element
    y = x_RHD.float() @ (H_DD / rotation_block(H_DD.shape[0]))
    finite = y.abs().amax(-1, keepdim=True) < math.inf
    total = torch.where(finite, y, 0).sum(0)
    return y, (total / finite.sum(0).clamp(min=1)).bfloat16()


def write_int8(y_RHD: Tensor, means_HD: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of rotated rows, with the mean taken off where that makes the scale smaller."""
    reach = y_RHD.abs().amax(-1, keepdim=True)
    finite = reach < math.inf
    y = torch.where(finite, y_RHD, 0)
    shifted = y - means_HD.float()
    shifted_reach = shifted.abs().amax(-1, keepdim=True)
    closer = finite & (shifted_reach < reach)
    y, reach = torch.where(closer, shifted, y), torch.where(closer, shifted_reach, reach)
    scale = _scale(reach, _CODES)
    codes = (y / _divisor(scale)).round().clamp(-_CODES, _CODES).to(torch.int8)
    return codes, torch.where(closer, scale, -scale)


def read_int8(codes_RHD: Tensor, H_DD: Tensor, scales_RH1: Tensor, means_HD: Tensor, dtype: torch.dtype) -> Tensor:
    means = torch.where(scales_RH1 > 0, means_HD.float() @ H_DD, 0)
    # the product is of integers, and exact
    x = (codes_RHD.float() @ H_DD) * scales_RH1.abs() + means
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-largest, largest).to(dtype)  # an error at the end of the range is no infinity


def run(function: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """Call `function`, compiled on a card: run as it is, it would write every step to memory."""
    # Triton knows e4m3 from compute capability 8.9 on; elsewhere only torch's own conversion does.
    on_card = x.is_cuda and not isinstance(x, FakeTensor) and not torch.compiler.is_compiling()
    if not on_card or torch.cuda.get_device_capability(x.device) < (8, 9):
        return function(x, *rest)
    return compiled(function)(x, *rest)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as kernels. The number of rows varies, and so may heads and strides."""
    return torch.compile(function)
