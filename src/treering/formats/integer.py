"""Integers of 3, 4 or 8 bits with one scale for the matrix, each row, or each group of inputs.

w = (q − zero) · scale          −2^(b−1) ≤ q < 2^(b−1),   zero = 0 unless asymmetric
scale = largest |w| / (2^(b−1) − ½)          symmetric, as compressed-tensors writes it: −amax becomes −2^(b−1)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from treering.formats import fused
from treering.formats.bits import as_bytes, divided, from_bytes, pack_stream, row_bytes
from treering.formats.layout import Piece, ScaledFormat, Tensors, grouped, largest, not_divisible


@dataclass(frozen=True, kw_only=True)
class Integer(ScaledFormat):
    """Integer codes, stored biased by 2^(b−1) as one bit stream a row.

    Attributes:
        width: bits of a code.
        group: inputs that share a scale; 0 for the whole row, −1 for the whole matrix.
        scale_dtype: in which scales are stored and the arithmetic is done; published folders use the model's.
        asymmetric: whether each group has a zero point besides its scale.
    """

    name: ClassVar[str] = "integer"
    width: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    group: int = 128
    scale_dtype: str = "float32"
    asymmetric: bool = False

    @property
    def label(self) -> str:
        return f"int{self.width}"

    @property
    def _half(self) -> int:
        return 1 << (self.width - 1)

    def refusal(self, rows: int, columns: int) -> str:
        return not_divisible(f"int{self.width}", columns, self.group) if self.group > 0 else ""

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        down, across = self.groups(rows, columns)
        by_rows = self.group >= 0
        pieces = {
            "codes": Piece(shape=(rows, row_bytes(columns, self.width))),
            "scales": Piece(shape=(down, across * self.dtype.itemsize), by_rows=by_rows),
        }
        return pieces | ({"zeros": Piece(shape=(down, across), by_rows=by_rows)} if self.asymmetric else {})

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows if self.group >= 0 else 1), (columns // self.group if self.group > 0 else 1)

    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0) -> dict[str, Tensor]:
        x = self._groups_of(weight.to(self.dtype))
        half = self._half
        if self.asymmetric:
            # Zero must be a value of its own, also where all weights of a group have one sign.
            low, high = x.amin(-1).clamp(max=0) * clip, x.amax(-1).clamp(min=0) * clip
            scales = divided(high - low, 2 * half - 1).to(self.dtype)
            zeros = (-half - low.to(self.dtype) / scales).clamp(-half, half - 1).round()
            zeros = torch.where(scales == 0, 0, zeros)
        else:
            scales = divided(largest(x, clip), half - 0.5)
            zeros = torch.zeros_like(scales)
        scales = torch.where(scales == 0, torch.finfo(self.dtype).eps, scales)
        codes = (x / scales[..., None] + zeros[..., None]).clamp(-half, half - 1).round()
        biased = (codes.to(torch.int16) + half).to(torch.uint8).reshape(weight.shape)
        tensors = {"codes": pack_stream(biased, self.width), "scales": as_bytes(scales)}
        return tensors | ({"zeros": as_bytes(zeros.to(torch.int8))} if self.asymmetric else {})

    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        zeros = from_bytes(tensors["zeros"], torch.int8).to(self.dtype) if self.asymmetric else None
        scales = from_bytes(tensors["scales"], self.dtype)
        return fused.integers(tensors["codes"], zeros, scales, self.width, columns, dtype)

    def damage(self, tensors: Tensors) -> str:
        return self.not_finite(tensors)

    def _groups_of(self, x: Tensor) -> Tensor:
        """View [..., rows, columns] as [..., *groups, elements of a group]."""
        if self.group < 0:
            return x.flatten(-2)[..., None, None, :]
        return grouped(x, self.group or x.shape[-1])
