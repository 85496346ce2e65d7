"""One quantized weight of a published folder: its number format, and how its tensors are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import NVFP4, Format
from treering.formats.bits import as_bytes

Read = Callable[[str], Tensor]
Shapes = Mapping[
    str, tuple[str, tuple[int, ...]]
]  # name of a stored tensor -> its dtype in safetensors' words, its shape


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One weight of a folder.

    Attributes:
        name: the key that it would have unquantized, in the folder's naming.
        shape: [..., outputs, inputs].
        form: its number format.
        keys: the stored tensors that it is made of.
        pieces: reads them and returns the tensors of `form`.
        transposed: whether the unquantized parameter holds inputs before outputs.
        rounding: the dtype that the format's own library rounds to before anything else sees the weight.
    """

    name: str
    shape: tuple[int, ...]
    form: Format
    keys: tuple[str, ...]
    pieces: Callable[[], dict[str, Tensor]]
    transposed: bool = False
    rounding: torch.dtype = torch.float32

    def read(self) -> dict[str, Tensor]:
        """Return the tensors of `form`, checked: wrong shapes and scales that are no numbers are refused."""
        tensors = self.pieces()
        if problem := self.form.problem(tensors, self.shape):
            raise CheckpointError(f"{self.name}: {problem}; the folder is damaged or not what its config.json says")
        return tensors

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as the unquantized parameter would hold it."""
        weight = self.form.decode(self.read(), self.shape[-1], self.rounding).to(dtype)
        return weight.mT.contiguous() if self.transposed else weight


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def need(shapes: Shapes, key: str, weight: str, folder: str) -> None:
    if key not in shapes:
        raise CheckpointError(f"{folder}: the quantized weight {weight} has no {key}; the folder is incomplete")


def nvfp4_pieces(
    module: str, codes: str, whole: str, convention: Any, shapes: Shapes, read: Read, folder: str
) -> tuple[Format, tuple[str, ...], Callable[[], dict[str, Tensor]]]:
    keys = (f"{module}.{codes}", f"{module}.weight_scale", f"{module}.{whole}")
    need(shapes, keys[2], f"{module}.weight", folder)

    def pieces() -> dict[str, Tensor]:
        packed, scales, scale = (read(key) for key in keys)
        return {"codes": packed, "scales": as_bytes(scales), "global": as_bytes(scale.float().reshape(1, 1))}

    return NVFP4(convention=convention), keys, pieces
