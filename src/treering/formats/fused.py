"""The large half of decoding: codes times scales, rounded once. On CUDA each of these functions is one kernel.

Formats compute their scales in float32 first, a number for each group; here they meet the codes. The functions are
plain torch, and compiled where the codes are on a card: run as they are, they would write every step to memory.
Each step is a look-up, an exact conversion or one product, so that the kernel has no freedom to round otherwise.

They see a list of groups, and not a matrix: the number of groups may vary, and everything else is a constant of the
kernel. Divisions by sizes that are not would cost a kernel more than its memory traffic.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from treering.formats.bits import look_up_nibbles, unpack_nibbles, unpack_stream


def nibbles(codes: Tensor, table: Tensor, scales: Tensor, high_first: bool, dtype: torch.dtype) -> Tensor:
    """Return table[code] · scale for 4-bit codes, two in each byte; scales […, rows, groups]."""
    values = _run(_nibbles, codes.reshape(scales.numel(), -1), table, scales.reshape(-1, 1), high_first, dtype)
    return values.view(*codes.shape[:-1], -1)


def octets(codes: Tensor, table: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return table[code] · scale for 8-bit codes; scales […, rows or 1, 1]."""
    scales = scales.expand(*codes.shape[:-1], 1).reshape(-1, 1)
    return _run(_octets, codes.flatten(0, -2), table, scales, dtype).view(codes.shape)


def blocks(codes: Tensor, table: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Return table[code] · scale for 8-bit codes; scales of blocks of `block` × `block`, short ones at the edges."""
    rows, columns = (torch.arange(size, device=codes.device) // block for size in codes.shape[-2:])
    by_row = scales[..., rows, :]  # […, rows, blocks]
    if codes.shape[-1] % block:
        return (table[codes.int()] * by_row[..., columns]).to(dtype)
    return _run(_octets, codes.reshape(by_row.numel(), block), table, by_row.reshape(-1, 1), dtype).view(codes.shape)


def integers(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, width: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return (code − 2^(width − 1) − zero) · scale, in the dtype of `scales` […, rows or 1, groups]."""
    if width not in (4, 8) or (columns * width) % 32:  # rows are filled up, or codes cross bytes
        q = _integers(codes, None, torch.ones_like(scales[..., :1]), width, columns, scales.dtype)
        q = q.unflatten(-1, (scales.shape[-1], -1))
        q = q if zeros is None else q - zeros[..., None]
        return (q * scales[..., None]).flatten(-2).to(dtype)
    shape = (*codes.shape[:-1], scales.shape[-1])
    by_group = [None if t is None else t.expand(shape).reshape(-1, 1) for t in (zeros, scales)]
    size = columns // scales.shape[-1]
    q = _run(_integers, codes.reshape(by_group[1].shape[0], -1), *by_group, width, size, dtype)  # type: ignore[union-attr]
    return q.view(*codes.shape[:-1], columns)


def _nibbles(codes: Tensor, table: Tensor, scales: Tensor, high_first: bool, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # a look-up of pairs would be a kernel of its own
        values = table[unpack_nibbles(codes, high_first=high_first).int()]
    else:
        values = look_up_nibbles(codes, table, high_first=high_first)
    return (values * scales).to(dtype)


def _octets(codes: Tensor, table: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (table[codes.int()] * scales).to(dtype)


def _integers(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, width: int, columns: int, dtype: torch.dtype
) -> Tensor:
    q = (unpack_stream(codes, width, columns).to(torch.int16) - (1 << (width - 1))).to(scales.dtype)
    return ((q if zeros is None else q - zeros) * scales).to(dtype)


def _run(function: Callable[..., Tensor], codes: Tensor, *rest: Any) -> Tensor:
    """Call `function` with codes [groups, bytes]; compiled on a card."""
    on_card = codes.is_cuda and not isinstance(codes, FakeTensor) and not torch.compiler.is_compiling()
    # What is narrower than float32 would have to be rounded in between, which a kernel need not do.
    narrow = any(isinstance(r, Tensor) and r.dtype in (torch.bfloat16, torch.float16) for r in rest)
    if not on_card or narrow or not codes.numel():
        return function(codes, *rest)
    return compiled(function, codes, *rest)


def compiled(function: Callable[..., Tensor], codes: Tensor, *rest: Any) -> Tensor:
    groups = [t for t in (codes, *rest) if isinstance(t, Tensor) and t.shape[0] == codes.shape[0]]
    for tensor in groups:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _kernel(function)(codes, *rest)


@cache
def _kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)
