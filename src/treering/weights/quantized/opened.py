"""A published quantized folder in the places of plain tensors: kept as stored, or decoded when read.

To the rest of the loader each quantized weight looks like one tensor of the name and shape that it would have
unquantized, so that transformers' mapping of names and merges applies to it unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.store.layout import DTYPES as STORE_DTYPES
from treering.store.model_folder import tensor_headers
from treering.store.untrusted import Header, in_folder, read_json
from treering.weights.quantized.folder import QuantizedFolder, read_quantized
from treering.weights.quantized.weight import EVERY, QuantizedWeight

Headers = Mapping[str, tuple[Path, Header]]
IN_CONFIG = ("quantization_config", "compression_config")  # the second: compressed-tensors, before version 0.6
MODELOPT = "hf_quant_config.json"
_TORCH = {name: getattr(torch, dtype) for dtype, name in STORE_DTYPES.items()} | {"F8_E8M0": torch.float8_e8m0fnu}


def quantization(folder: Path) -> Mapping[str, Any] | None:
    """Return how the weights of a folder are quantized, as its JSON files describe it; None: they are not."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in IN_CONFIG:
            if place.get(key):
                if not isinstance(place[key], dict):
                    raise CheckpointError(f"{folder}/config.json: {key} is not a mapping")
                return place[key]
    return read_json(folder / MODELOPT) if in_folder(folder, MODELOPT) else None


def open_quantized(folder: Path) -> QuantizedFolder | None:
    """Return the quantized weights of a folder, or None if it has none. Of its tensors only descriptions are read."""
    config = quantization(folder)
    if config is None:
        return None
    headers = tensor_headers(folder)
    shapes = {name: (header.dtype, header.shape) for name, (_, header) in headers.items()}
    reader = FolderReader(headers)
    quantized = read_quantized(config, shapes, reader, str(folder))
    reader.shapes_only = True
    for weight in quantized.weights.values():  # a tensor of a wrong size is refused before anything is loaded
        weight.read()
    reader.shapes_only = False
    return quantized


@dataclass
class FolderReader:
    """Reads stored tensors, or rows of them, by the offsets in the headers: other bytes stay unread.

    Attributes:
        shapes_only: return tensors on the meta device, and read nothing.
    """

    headers: Headers
    shapes_only: bool = False

    def __call__(self, key: str, rows: slice = EVERY, /) -> Tensor:
        """Return the tensor `key`, or `rows` of it along dimension 0."""
        path, header = self.headers[key]
        dtype = _TORCH.get(header.dtype)
        if dtype is None:
            raise CheckpointError(f"{path}: {key} is stored as {header.dtype}, which is not read here")
        count = header.shape[0] if header.shape else 1
        start, stop, _ = rows.indices(count) if header.shape else (0, 1, 1)
        each = header.bytes // max(count, 1)
        shape = (max(0, stop - start), *header.shape[1:]) if header.shape else ()
        if stop <= start or not each or self.shapes_only:
            return torch.empty(shape, dtype=dtype, device="meta" if self.shapes_only else None)
        with path.open("rb") as file:
            first = 8 + int.from_bytes(file.read(8), "little") + header.start
            file.seek(first + start * each)
            data = bytearray((stop - start) * each)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{path} ends within {key}; it was changed after it was opened")
        return torch.frombuffer(data, dtype=dtype).view(shape)


@dataclass(frozen=True)
class DecodedWeight:
    """A quantized weight in the place of a safetensors file that holds it decoded. It reads rows where it can."""

    file: Path
    weight: QuantizedWeight
    dtype: torch.dtype

    def __str__(self) -> str:
        return str(self.file)

    def __enter__(self) -> "DecodedWeight":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def get_slice(self, key: str) -> "DecodedWeight":
        """Return an object with shape and rows, as an opened safetensors file does."""
        return self

    def get_shape(self) -> list[int]:
        """Return the shape of the decoded weight."""
        return list(self.weight.dense_shape)

    def get_tensor(self, key: str) -> Tensor:
        """Return the decoded weight."""
        return self.weight.dense(self.dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.weight.dense_shape[0])
        if stop <= start:
            return torch.empty((0, *self.weight.dense_shape[1:]), dtype=self.dtype)
        return self.weight.dense(self.dtype, slice(start, stop))


def open_tensors(file: Path | DecodedWeight) -> Any:
    """Return an opened safetensors file, or a quantized weight in its place, which reads like one."""
    return file if isinstance(file, DecodedWeight) else safe_open(file, "pt")


def as_decoded(headers: Headers, quantized: QuantizedFolder, dtype: torch.dtype) -> dict[str, tuple[Any, Header]]:
    """Return `headers` with one tensor of `dtype` for each quantized weight, and without the tensors it is made of."""
    parts = {key for weight in quantized.weights.values() for key in weight.keys}.union(quantized.ignored)
    decoded: dict[str, tuple[Any, Header]] = {key: entry for key, entry in headers.items() if key not in parts}
    name_of_dtype = STORE_DTYPES[str(dtype).removeprefix("torch.")]
    for name, weight in quantized.weights.items():
        file = headers[weight.keys[0]][0]
        header = Header(name=name, dtype=name_of_dtype, shape=weight.dense_shape, bytes=0, start=0)
        decoded[name] = DecodedWeight(file, weight, dtype), header
    return decoded
