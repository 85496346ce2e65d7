"""Eight-bit floats (e4m3): one scale for the matrix, for each row, or for each block of rows and columns.

w = e4m3(code) · scale          scale = largest |w| / 448
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from treering.formats import fused
from treering.formats.bits import as_bytes, constant, divided, from_bytes
from treering.formats.layout import Piece, ScaledFormat, Tensors

LARGEST = 448.0
_E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


def e4m3(x: Tensor) -> Tensor:
    """Round to float8_e4m3fn. Clamped first: before torch 2.13 a value over 448 became NaN."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def e4m3_table(device: torch.device) -> Tensor:
    """Return the 256 values of e4m3 in float32."""
    return constant(_E4M3, device)


def has_nan(codes: Tensor) -> bool:
    """Return whether a byte is one of e4m3's two NaN codes."""
    return bool(((codes & 127) == 127).any())


@dataclass(frozen=True, kw_only=True)
class FP8(ScaledFormat):
    """e4m3 codes with one scale for the matrix or for each row: 8 bits a weight.

    Attributes:
        scale: `channel`, one for each row, or `tensor`.
        scale_dtype: in which scales are stored and the arithmetic is done; published folders use the model's.
    """

    name: ClassVar[str] = "fp8"
    scale: Literal["channel", "tensor"] = "channel"
    scale_dtype: str = "float32"

    def refusal(self, rows: int, columns: int) -> str:
        return ""

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        channel = self.scale == "channel"
        scales = Piece(shape=(rows if channel else 1, self.dtype.itemsize), by_rows=channel)
        return {"codes": Piece(shape=(rows, columns)), "scales": scales}

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows if self.scale == "channel" else 1), 1

    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0) -> dict[str, Tensor]:
        x = weight.to(self.dtype)
        amax = x.abs().amax(-1 if self.scale == "channel" else (-2, -1), keepdim=True)
        scales = divided((amax * clip).to(self.dtype), LARGEST)
        scales = torch.where(scales == 0, torch.finfo(self.dtype).eps, scales)
        return {"codes": as_bytes(e4m3(x / scales)), "scales": as_bytes(scales)}

    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        table = e4m3_table(tensors["codes"].device).to(self.dtype)
        return fused.octets(tensors["codes"], table, from_bytes(tensors["scales"], self.dtype), dtype)

    def damage(self, tensors: Tensors) -> str:
        if "codes" in tensors and has_nan(tensors["codes"]):
            return "a code of fp8 is NaN (byte 127 or 255)"
        return self.not_finite(tensors)


@dataclass(frozen=True, kw_only=True)
class FP8Block(ScaledFormat):
    """e4m3 codes with one scale for each block of `block` × `block`: DeepSeek's published form.

    Blocks at the lower and right edges are short. The stored scale multiplies, although DeepSeek calls it `scale_inv`.

    Attributes:
        block: rows and columns that share a scale.
        scale_dtype: in which scales are stored; the arithmetic of decoding is done in it.
    """

    name: ClassVar[str] = "fp8_block"
    block: int = 128
    scale_dtype: str = "float32"

    def refusal(self, rows: int, columns: int) -> str:
        return ""

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        down, across = self.groups(rows, columns)
        return {
            "codes": Piece(shape=(rows, columns)),
            "scales": Piece(shape=(down, self.dtype.itemsize * across), by_rows=False),
        }

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.block), -(-columns // self.block)

    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0) -> dict[str, Tensor]:
        x = weight.float()
        rows, columns = x.shape[-2:]
        # Padded for the maximum only: what is stored has the weight's own shape.
        blocks = pad(x, (0, -columns % self.block, 0, -rows % self.block))
        blocks = blocks.unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block))
        amax = blocks.abs().amax((-3, -1)) * clip
        scales = divided(torch.where(amax > 0, amax, LARGEST), LARGEST).to(self.dtype)
        return {"codes": as_bytes(e4m3(x / self._expand(scales, rows, columns))), "scales": as_bytes(scales)}

    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        table = e4m3_table(tensors["codes"].device).to(self.dtype)
        return fused.blocks(tensors["codes"], table, from_bytes(tensors["scales"], self.dtype), self.block, dtype)

    def damage(self, tensors: Tensors) -> str:
        if "codes" in tensors and has_nan(tensors["codes"]):
            return "a code of fp8_block is NaN (byte 127 or 255)"
        return self.not_finite(tensors)

    def _expand(self, scales: Tensor, rows: int, columns: int) -> Tensor:
        down = scales.repeat_interleave(self.block, -2)[..., :rows, :]
        return down.repeat_interleave(self.block, -1)[..., :columns]
