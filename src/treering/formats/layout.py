"""What every number format is: pure functions between a weight and the uint8 tensors that hold it.

Shapes: a weight is W[..., rows, columns], rows = outputs, columns = inputs; leading dimensions are the experts of a
stack, each encoded alone. A group is a piece of a row, or a block of rows and columns, that shares one scale.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from treering.formats.bits import from_bytes

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The layout of one uint8 tensor of a packed matrix, without the dimensions of a stack.

    Attributes:
        shape: of the tensor.
        by_rows: whether row i of the tensor belongs to row i of the weight alone, so that both may be cut alike.
    """

    shape: tuple[int, ...]
    by_rows: bool = True


class Format(ABC):
    """A number format with its settings. Subclasses are frozen dataclasses; two equal formats write equal bytes.

    Example:
        >>> packed = NVFP4().encode(weight)          # {"codes": uint8, "scales": uint8, "global": uint8}
        >>> again = NVFP4().decode(packed, torch.bfloat16)
    """

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, rows: int, columns: int) -> str:
        """Return why a matrix of this shape cannot be stored, or the empty string."""

    @abstractmethod
    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        """Return the tensors that hold a matrix of this shape."""

    @abstractmethod
    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many groups the matrix has along its rows and columns: the shape of `clip` in `encode`."""

    @abstractmethod
    def encode(self, weight: Tensor, *, clip: Tensor | float = 1.0) -> dict[str, Tensor]:
        """Return the tensors that hold `weight` [..., rows, columns].

        Args:
            weight: finite, of a floating dtype. Arithmetic is done in its dtype where the format's library does so.
            clip: factor in (0, 1] on the largest absolute value of each group, one number or [..., *groups]: larger
                values saturate, and the others are rounded more finely.
        """

    @abstractmethod
    def decode(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the weight [..., rows, columns] that the tensors stand for, rounded once to `dtype`."""

    @abstractmethod
    def damage(self, tensors: Tensors) -> str:
        """Return which scale or code is no number that this format can hold, or the empty string.

        `tensors` may be some of a weight's tensors, and some rows of each.
        """

    def problem(self, tensors: Tensors, shape: tuple[int, ...]) -> str:
        """Return what is wrong with tensors that claim to hold a weight of `shape`, or the empty string."""
        *stack, rows, columns = shape
        pieces = self.pieces(rows, columns)
        if missing := sorted(pieces.keys() - tensors.keys()):
            return f"tensors of {self.name} are missing: {', '.join(missing)}"
        if unknown := sorted(tensors.keys() - pieces.keys()):
            return f"tensors that {self.name} does not know: {', '.join(unknown)}"
        for key, piece in pieces.items():
            expected = (*stack, *piece.shape)
            if tensors[key].dtype != torch.uint8 or tuple(tensors[key].shape) != expected:
                there = f"{tensors[key].dtype} {list(tensors[key].shape)}".removeprefix("torch.")
                return f"{key} of {self.name} is {there}; a weight of {list(shape)} needs uint8 {list(expected)}"
        return self.damage(tensors)

    def bits(self, rows: int, columns: int) -> float:
        """Return the stored bits per element of a matrix of this shape, scales included."""
        return 8 * sum(math.prod(p.shape) for p in self.pieces(rows, columns).values()) / (rows * columns)

    @property
    def label(self) -> str:
        """The name for people; that of integers says their width."""
        return self.name

    def settings(self) -> dict[str, Any]:
        """Return the name and the fields, as JSON can hold them: `formats.from_settings` reads them."""
        return {"format": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


class ScaledFormat(Format):
    """A format whose scales are floating-point numbers of the dtype that its field `scale_dtype` names."""

    scale_dtype: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.scale_dtype)

    def not_finite(self, tensors: Tensors) -> str:
        """Return the message of `damage` about a scale that is not finite, or the empty string."""
        finite = "scales" not in tensors or bool(from_bytes(tensors["scales"], self.dtype).isfinite().all())
        return "" if finite else f"a scale of {self.name} is not finite"


def grouped(t: Tensor, size: int) -> Tensor:
    """View [..., columns] as [..., groups, size]."""
    return t.unflatten(-1, (-1, size))


def largest(t_groups: Tensor, clip: Tensor | float) -> Tensor:
    """Return the largest absolute value of each group (last dimension), times `clip`, in the dtype of the groups."""
    amax = t_groups.abs().amax(-1)
    return amax if isinstance(clip, float) and clip == 1.0 else (amax * clip).to(amax.dtype)


def not_divisible(name: str, columns: int, size: int) -> str:
    return f"{name} groups {size} inputs, and {columns} inputs are no multiple of {size}" if columns % size else ""
