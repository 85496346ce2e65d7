"""Four-bit floats: mxfp4 (32 inputs share a power of two), nvfp4 (16 inputs share an e4m3 scale, a matrix a float32).

mxfp4   w = E2M1(code) · 2^(u − 127)
nvfp4   w = E2M1(code) · scale / global     (divide, compressed-tensors), or · scale · global (multiply, modelopt)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from treering.formats import fused
from treering.formats.bits import as_bytes, from_bytes, pack_nibbles
from treering.formats.e2m1 import LARGEST, e2m1_codes, e2m1_table, e8m0_scales, e8m0_values
from treering.formats.float8 import LARGEST as E4M3_LARGEST
from treering.formats.float8 import e4m3, has_nan
from treering.formats.layout import Format, Piece, Tensors, grouped, largest, not_divisible


@dataclass(frozen=True, kw_only=True)
class MXFP4(Format):
    """E2M1 codes, 32 inputs to one power of two: 4.25 bits a weight. gpt-oss is published in it.

    Attributes:
        rounding: of the scale when a weight is encoded; decoding does not depend on it (see `e8m0_scales`).
    """

    name: ClassVar[str] = "mxfp4"
    group: ClassVar[int] = 32
    rounding: Literal["even", "floor", "ceil"] = "even"

    def refusal(self, rows: int, columns: int) -> str:
        return not_divisible(self.name, columns, self.group)

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        return {"codes": Piece(shape=(rows, columns // 2)), "scales": Piece(shape=(rows, columns // self.group))}

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns // self.group

    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0) -> dict[str, Tensor]:
        x = grouped(weight.float(), self.group)
        scales = e8m0_scales(largest(x, clip), self.rounding)
        codes = e2m1_codes(x / e8m0_values(scales)[..., None])
        return {"codes": pack_nibbles(codes.flatten(-2)), "scales": scales}

    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        table = e2m1_table(tensors["codes"].device)
        return fused.nibbles(tensors["codes"], table, e8m0_values(tensors["scales"]), False, dtype)

    def damage(self, tensors: Tensors) -> str:
        damaged = "scales" in tensors and bool((tensors["scales"] == 255).any())
        return "a scale of mxfp4 is NaN (byte 255)" if damaged else ""


@dataclass(frozen=True, kw_only=True)
class NVFP4(Format):
    """E2M1 codes, 16 inputs to one e4m3 scale, one float32 scale for each part of a matrix: 4.5 bits a weight.

    Attributes:
        convention: whether the global scale divides (compressed-tensors) or multiplies (modelopt, torchao).
        parts: how many equal runs of rows have a global scale of their own. Encoding gives all the same one, because
            engines that merge gate and up keep one; published folders may hold two.
    """

    name: ClassVar[str] = "nvfp4"
    group: ClassVar[int] = 16
    convention: Literal["divide", "multiply"] = "divide"
    parts: int = 1

    def refusal(self, rows: int, columns: int) -> str:
        if rows % self.parts:
            return f"{rows} rows cannot be divided into {self.parts} parts of nvfp4"
        return not_divisible(self.name, columns, self.group)

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        return {
            "codes": Piece(shape=(rows, columns // 2)),
            "scales": Piece(shape=(rows, columns // self.group)),
            "global": Piece(shape=(self.parts, 4), by_rows=False),
        }

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns // self.group

    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0, amax: Tensor | None = None) -> dict[str, Tensor]:
        """As `Format.encode`; `amax` [...] is the largest value over the matrices that share a global scale."""
        x = grouped(weight, self.group)
        top = weight.abs().amax((-2, -1)) if amax is None else amax.to(weight.dtype)
        # A matrix of zeros has no scale of its own: any finite one holds it.
        top = torch.where(top == 0, torch.ones_like(top), top)
        factor = LARGEST * E4M3_LARGEST / top if self.convention == "divide" else top / (LARGEST * E4M3_LARGEST)
        whole = factor.float()[..., None, None]  # [..., 1, 1], against [..., rows, groups]
        share = largest(x, clip) / torch.full((), LARGEST, dtype=weight.dtype, device=weight.device)
        scales = e4m3(whole * share if self.convention == "divide" else share.float() / whole)
        # The smallest scale that compressed-tensors writes for a group of zeros; its value cannot matter.
        scales = torch.where(scales.float() == 0, torch.full((), 0.125, device=weight.device), scales.float())
        step = scales / whole if self.convention == "divide" else scales * whole
        codes = e2m1_codes(x / step[..., None])
        parts = whole.flatten(-2).unsqueeze(-2).expand(*whole.shape[:-2], self.parts, 1)
        return {
            "codes": pack_nibbles(codes.flatten(-2)),
            "scales": as_bytes(e4m3(scales)),
            "global": as_bytes(parts),
        }

    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        scales = from_bytes(tensors["scales"], torch.float8_e4m3fn).float()
        whole = from_bytes(tensors["global"], torch.float32)  # [..., parts, 1]
        by_part = scales.unflatten(-2, (self.parts, -1))
        step = by_part / whole[..., None] if self.convention == "divide" else by_part * whole[..., None]
        table = e2m1_table(tensors["codes"].device)
        return fused.nibbles(tensors["codes"], table, step.flatten(-3, -2), False, dtype)

    def damage(self, tensors: Tensors) -> str:
        if "scales" in tensors and has_nan(tensors["scales"]):
            return "a scale of nvfp4 is NaN (byte 127 or 255)"
        whole = from_bytes(tensors["global"], torch.float32) if "global" in tensors else torch.ones(())
        if not bool((whole.isfinite() & (whole > 0)).all()):
            return "a global scale of nvfp4 is not a positive finite number"
        return ""
