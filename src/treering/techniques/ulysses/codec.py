"""8-bit codecs of the exchange: a block of tokens × heads becomes one message of bytes, and back.

    e4m3    x̂ = e4m3(code) · s                  s = largest |x| of the row / 448
    int8    x̂ = (code · H) s + a m              y = x H / b,   s = largest |y − a μ| of the row / 127

A row is one token of one head. H is the Hadamard matrix of b = D entries ±1, H H = b: it spreads a large channel over
all of them. μ is the mean of y over the tokens of the block, rounded to bfloat16 and sent with it, and m = μ H is added
back after decoding, so that a constant offset of a channel costs no precision; it needs no property of the softmax, and
serves values and gradients alike. a is 1 or 0, chosen for each row by the smaller s: rows that are small next to the
mean, such as gradients of tokens without a target, keep their precision, and zeros stay zeros.

    message:    codes R × H × D  |  scales R × H, float32  |  int8 only: μ, H × D, bfloat16      each up to 16 bytes

The sign of a scale of int8 is a: negative where 0. Nothing is raised on values, and nothing depends on them but values:
the lengths, the shapes and the order of operations are the same on every rank.

* There is no least scale: a row keeps the codec's precision however small it is, down to about D times float32's
  smallest number, 1.4e-45, and is coded to within that below.
* A row with an infinity or a NaN is decoded as a row of NaN. It has no part in the mean, so no other row changes.
* float64 is rounded to float32 first: a row above its range is decoded as NaN, numbers below it as 0.

Shapes: R rows of tokens, H heads, D width of a head.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from treering.core.errors import ConfigError, PlanError
from treering.formats.float8 import LARGEST, e4m3_table
from treering.techniques.ulysses.codec_kernels import (
    SMALLEST,
    hadamard,
    read_e4m3,
    read_int8,
    rotate,
    rotation_block,
    run,
    write_e4m3,
    write_int8,
)

ALIGNMENT = 16  # bytes: what a message and its parts begin at, so that they can be viewed as wider types
LEAST_ROTATION = 8  # channels among which a rotation spreads a large one; fewer are not worth it


class RowCodec(ABC):
    """How the rows of a block are written in 8 bits. Subclasses are frozen dataclasses and keep no state.

    Example:
        >>> rows = codec("int8")
        >>> message = rows.encode(key_RHD)                     # uint8, rows.size(R, H, D) bytes
        >>> again = rows.decode(message, R, H, D, torch.bfloat16)
    """

    name: ClassVar[str]

    def check(self, width: int) -> None:
        """Refuse a head width that the codec cannot write; here: none."""
        del width

    def size(self, rows: int, heads: int, width: int) -> int:
        """Return the bytes of the message of a block, a multiple of 16; 0 for a block without elements."""
        self.check(width)
        return sum(aligned(part) for part in self.parts(rows, heads, width)) if rows * heads * width else 0

    @abstractmethod
    def parts(self, rows: int, heads: int, width: int) -> list[int]:
        """Return the bytes of each part of the message, without alignment."""

    @torch.no_grad()
    def encode(self, x_RHD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the message of a block, uint8 [size].

        Args:
            x_RHD: of any floating dtype; it may be a strided view.
            out: where to write the message, a contiguous uint8 tensor of `size` bytes that begins at a multiple of 16,
                such as a slice of a send buffer. None: a new tensor.
        """
        bytes_of_all = self.size(*x_RHD.shape)
        out = torch.empty(bytes_of_all, dtype=torch.uint8, device=x_RHD.device) if out is None else out
        if bytes_of_all:
            parts = self._views(out, *x_RHD.shape, clear=True)
            with torch.autocast(x_RHD.device.type, enabled=False):
                self._write(x_RHD, parts)
        return out

    @torch.no_grad()
    def decode(self, message: Tensor, rows: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return the block that `message` stands for, [rows, heads, width], contiguous, rounded once to `dtype`."""
        if not self.size(rows, heads, width):
            return torch.empty(rows, heads, width, dtype=dtype, device=message.device)
        if message.storage_offset() % 4:
            message = message.clone()  # scales are viewed as float32, which needs an aligned start
        with torch.autocast(message.device.type, enabled=False):
            return self._read(self._views(message, rows, heads, width), dtype)

    @torch.no_grad()
    def error(self, x_RHD: Tensor, message: Tensor | None = None) -> Tensor:
        """Return (sum of squares of the coding error, sum of squares of the block), float64 [2], without a wait.

        Args:
            x_RHD: the block.
            message: its message, where it was encoded already.

        Rows that are not finite are left out. Sums of blocks may be added; √(first / second) is the relative error.
        """
        message = self.encode(x_RHD) if message is None else message
        rows, heads, width = x_RHD.shape
        decoded = self.decode(message, rows, heads, width, torch.float32)
        exact = x_RHD.float()
        difference = decoded - exact
        finite = difference.isfinite().all(-1, keepdim=True)
        squares = [torch.where(finite, t, 0).double().square().sum() for t in (difference, exact)]
        return torch.stack(squares)

    @abstractmethod
    def bound(self, x_RHD: Tensor) -> Tensor:
        """Return for each row an upper bound of the Euclidean norm of its error, [R, H] in float64.

        It counts the coding in float32, and not the rounding of what is decoded to another dtype.
        """

    @abstractmethod
    def _write(self, x_RHD: Tensor, parts: list[Tensor]) -> None: ...

    @abstractmethod
    def _read(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor: ...

    def _views(self, message: Tensor, rows: int, heads: int, width: int, *, clear: bool = False) -> list[Tensor]:
        """Return codes [R, H, D], scales [R, H, 1] and means [H, D] as views of the message; `clear` the gaps."""
        views, start = [], 0
        sizes = self.parts(rows, heads, width)
        for size, shape, dtype in zip(
            sizes,
            ((rows, heads, width), (rows, heads, 1), (heads, width)),
            (torch.uint8, torch.float32, torch.bfloat16),
            strict=False,
        ):
            views.append(message[start : start + size].view(dtype).view(shape))
            end = start + aligned(size)
            if clear and end > start + size:
                message[start + size : end].zero_()  # equal blocks have equal messages
            start = end
        return views


@dataclass(frozen=True, kw_only=True)
class E4M3Row(RowCodec):
    """An 8-bit float for each element and one float32 scale for each row: 1 + 4/D bytes an element.

    What LightX2V sends, without its least scale: gradients are smaller than that. An element is off by at most 1/16 of
    itself, or by s / 1024 where that is more.
    """

    name: ClassVar[str] = "e4m3"

    def parts(self, rows: int, heads: int, width: int) -> list[int]:
        return [rows * heads * width, 4 * rows * heads]

    def bound(self, x_RHD: Tensor) -> Tensor:
        x = x_RHD.float().double().abs()
        scale = x.amax(-1, keepdim=True) / LARGEST
        # the last term: a scale is a multiple of float32's smallest number, and a decoded element is one
        element = torch.maximum(x / 16, scale / 1024) * (1 + 2**-16) + 2 * SMALLEST
        return element.square().sum(-1).sqrt()

    def _write(self, x_RHD: Tensor, parts: list[Tensor]) -> None:
        codes, scales = parts
        for part, value in zip((codes.view(torch.float8_e4m3fn), scales), run(write_e4m3, x_RHD)):
            part.copy_(value)

    def _read(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        return run(read_e4m3, codes, scales, e4m3_table(codes.device), dtype)


@dataclass(frozen=True, kw_only=True)
class Int8Row(RowCodec):
    """Rotated, with the mean of the block apart, an 8-bit integer for each element: 1 + 4/D + 2/R bytes an element.

    The rotation is over the complete head where D is a power of two, else over blocks of the largest power of two that
    divides D. The norm of a row's error is at most √(D b) s / 2.
    """

    name: ClassVar[str] = "int8"

    def check(self, width: int) -> None:
        """Refuse a width that has no power of two to rotate over."""
        if rotation_block(width) < min(LEAST_ROTATION, width):
            raise PlanError(
                f"codec int8 rotates heads over a power of two of at least {LEAST_ROTATION} channels, and heads of "
                f"{width} are no multiple of it; set ulysses.codec: e4m3, or none",
                settings=("ulysses.codec",),
            )

    def parts(self, rows: int, heads: int, width: int) -> list[int]:
        return [rows * heads * width, 4 * rows * heads, 2 * heads * width]

    def bound(self, x_RHD: Tensor) -> Tensor:
        width = x_RHD.shape[-1]
        x, block = x_RHD.float().double(), rotation_block(width)
        scale = self._scales(x_RHD).double().abs()[..., 0]
        # rounding of sums of b products in float32, on both sides; then what is smaller than float32 can hold
        rounding = 2**-20 * x.norm(dim=-1) + 2 * math.sqrt(width) * block * SMALLEST
        return math.sqrt(width * block) * scale / 2 * (1 + 2**-16) + rounding

    def _scales(self, x_RHD: Tensor) -> Tensor:
        return self._views(self.encode(x_RHD), *x_RHD.shape)[1]

    def _write(self, x_RHD: Tensor, parts: list[Tensor]) -> None:
        codes, scales, means = parts
        rotation = hadamard(x_RHD.shape[-1], x_RHD.device)
        y, center = run(rotate, x_RHD, rotation)
        for part, value in zip((codes.view(torch.int8), scales, means), (*run(write_int8, y, center), center)):
            part.copy_(value)

    def _read(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales, means = parts
        rotation = hadamard(codes.shape[-1], codes.device)
        return run(read_int8, codes.view(torch.int8), rotation, scales, means, dtype)


_CODECS: dict[str, RowCodec | None] = {"none": None, "e4m3": E4M3Row(), "int8": Int8Row()}


def codec(name: str) -> RowCodec | None:
    """Return the codec that a configuration names: `e4m3`, `int8`, or None for `none`."""
    if name not in _CODECS:
        raise ConfigError(f"{name!r} is no codec; there are {', '.join(_CODECS)}", field="codec")
    return _CODECS[name]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
