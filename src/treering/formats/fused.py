"""The large half of decoding: codes times scales, rounded once. On CUDA each of these functions is one kernel.

Formats compute their scales in float32 first, a number for each group; here they meet the codes. The functions are
plain torch, and compiled where the codes are on a card: run as they are, they would write every step to memory.
Each step is a look-up, an exact conversion or one product, so that the kernel has no freedom to round otherwise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from treering.formats.bits import look_up_nibbles, unpack_stream


def nibbles(codes: Tensor, table: Tensor, scales: Tensor, high_first: bool, dtype: torch.dtype) -> Tensor:
    """Return table[code] · scale for 4-bit codes, two in each byte; scales […, rows, groups]."""
    return _run(_nibbles, codes, table, scales, high_first, dtype)


def octets(codes: Tensor, table: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Return table[code] · scale for 8-bit codes; scales […, rows or 1, 1], or of blocks of `block` × `block`."""
    return _run(_octets, codes, table, scales, block, dtype)


def integers(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, width: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return (code − 2^(width − 1) − zero) · scale, in the dtype of `scales` […, rows or 1, groups]."""
    return _run(_integers, codes, zeros, scales, width, columns, dtype)


def _nibbles(codes: Tensor, table: Tensor, scales: Tensor, high_first: bool, dtype: torch.dtype) -> Tensor:
    values = look_up_nibbles(codes, table, high_first=high_first).unflatten(-1, (scales.shape[-1], -1))
    return (values * scales[..., None]).flatten(-2).to(dtype)


def _octets(codes: Tensor, table: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    values = table[codes.int()]
    if block:
        rows, columns = (torch.arange(size, device=codes.device) // block for size in codes.shape[-2:])
        scales = scales[..., rows, :][..., columns]
    return (values * scales).to(dtype)


def _integers(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, width: int, columns: int, dtype: torch.dtype
) -> Tensor:
    q = unpack_stream(codes, width, columns).to(torch.int16) - (1 << (width - 1))
    q = q.to(scales.dtype).unflatten(-1, (scales.shape[-1], -1))
    if zeros is not None:
        q = q - zeros[..., None]
    return (q * scales[..., None]).flatten(-2).to(dtype)


def _run(function: Callable[..., Tensor], codes: Tensor, *rest: Any) -> Tensor:
    on_card = codes.is_cuda and not isinstance(codes, FakeTensor) and not torch.compiler.is_compiling()
    # What is narrower than float32 would have to be rounded in between, which a kernel need not do.
    narrow = any(isinstance(r, Tensor) and r.dtype in (torch.bfloat16, torch.float16) for r in rest)
    if not on_card or narrow:
        return function(codes, *rest)
    # Matrices as stacks of one: a kernel is compiled for each number of dimensions.
    stacks = [t[None] if isinstance(t, Tensor) and codes.ndim == t.ndim == 2 else t for t in (codes, *rest)]
    return _compiled(function)(*stacks).reshape(*codes.shape[:-1], -1)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)
