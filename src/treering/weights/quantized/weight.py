"""One quantized weight of a published folder: its number format, and how its tensors are read, rows of them or all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import NF4, NVFP4, Format, FP8Block
from treering.formats.bits import as_bytes

EVERY = slice(None)
Shapes = Mapping[
    str, tuple[str, tuple[int, ...]]
]  # name of a stored tensor -> its dtype in safetensors' words, its shape
PieceReader = Callable[[slice], Tensor]  # rows of one tensor of a format, dimension 0 of [..., rows, bytes]


class Read(Protocol):
    """Reads a stored tensor by its name, or some rows of it."""

    def __call__(self, key: str, rows: slice = EVERY, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One weight of a folder.

    Attributes:
        name: the key that it would have unquantized, in the folder's naming.
        shape: [..., outputs, inputs].
        form: its number format.
        keys: the stored tensors that it is made of.
        readers: of each tensor of `form`.
        transposed: whether the unquantized parameter holds inputs before outputs.
        rounding: the dtype that the format's own library rounds to before anything else sees the weight.
    """

    name: str
    shape: tuple[int, ...]
    form: Format
    keys: tuple[str, ...]
    readers: Mapping[str, PieceReader]
    transposed: bool = False
    rounding: torch.dtype = torch.float32

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the unquantized parameter."""
        *stack, rows, columns = self.shape
        return (*stack, columns, rows) if self.transposed else self.shape

    def piece(self, key: str, rows: slice = EVERY) -> Tensor:
        """Return one tensor of `form`, or rows of it, checked: wrong shapes and scales that are no numbers are refused.

        Args:
            key: the format's name of the tensor.
            rows: along dimension 0: experts of a stack, else rows of the tensor.
        """
        expected = (*self.shape[:-2], *self.form.pieces(*self.shape[-2:])[key].shape)
        start, stop, _ = rows.indices(expected[0])
        wanted = (max(0, stop - start), *expected[1:])
        try:
            tensor = self.readers[key](slice(start, max(start, stop)))
        except RuntimeError as error:  # torch's, of lengths that do not fit together
            raise CheckpointError(f"{self.name}: {key} of {self.form.name}: {error}; the folder is damaged") from None
        problem = ""
        if tuple(tensor.shape) == wanted and not tensor.is_meta:
            problem = self.form.damage({key: tensor})
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted:
            shown = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            problem = f"{key} of {self.form.name} is {shown}; a weight of {list(self.shape)} needs uint8 {list(wanted)}"
        if problem:
            raise CheckpointError(f"{self.name}: {problem}; the folder is damaged or not what its config.json says")
        return tensor

    def read(self) -> dict[str, Tensor]:
        """Return the tensors of `form`."""
        return {key: self.piece(key) for key in self.readers}

    def dense(self, dtype: torch.dtype, rows: slice = EVERY) -> Tensor:
        """Return the weight, or rows along its dimension 0, as the unquantized parameter would hold it."""
        start, stop, _ = rows.indices(self.shape[0])
        tensors, first = self._cut(start, stop)
        decoded = self.form.decode(tensors, self.shape[-1], self.rounding).to(dtype)
        weight = decoded[start - first : stop - first]
        return weight.mT.contiguous() if self.transposed else weight

    def _cut(self, start: int, stop: int) -> tuple[dict[str, Tensor], int]:
        """Return tensors that hold rows of the weight, `start` to `stop` among them, and which row is their first."""
        if len(self.shape) > 2:  # experts
            return {key: self.piece(key, slice(start, stop)) for key in self.readers}, start
        if isinstance(self.form, NF4) and self.form.nested:  # its scales are blocked across rows
            return self.read(), 0
        block = self.form.block if isinstance(self.form, FP8Block) else 1
        first = start - start % block
        blocks = slice(first // block, -(-stop // block)) if block > 1 else EVERY
        pieces = self.form.pieces(*self.shape)
        return {key: self.piece(key, slice(first, stop) if pieces[key].by_rows else blocks) for key in pieces}, first


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def need(shapes: Shapes, key: str, weight: str, folder: str) -> None:
    """Raise CheckpointError if the folder has no tensor `key` of the quantized weight `weight`."""
    if key not in shapes:
        raise CheckpointError(f"{folder}: the quantized weight {weight} has no {key}; the folder is incomplete")


def nvfp4_pieces(
    module: str, codes: str, whole: str, convention: Any, shapes: Shapes, read: Read, folder: str
) -> tuple[Format, tuple[str, ...], dict[str, PieceReader]]:
    """Return the format, the stored tensors and the readers of an nvfp4 weight.

    Args:
        module: the linear.
        codes: its tensor of codes.
        whole: its global scale.
        convention: that of `NVFP4`.
    """
    keys = (f"{module}.{codes}", f"{module}.weight_scale", f"{module}.{whole}")
    need(shapes, keys[2], f"{module}.weight", folder)
    readers: dict[str, PieceReader] = {
        "codes": lambda rows: read(keys[0], rows),
        "scales": lambda rows: as_bytes(read(keys[1], rows)),
        "global": lambda rows: as_bytes(read(keys[2]).float().reshape(1, 1))[rows],
    }
    return NVFP4(convention=convention), keys, readers
