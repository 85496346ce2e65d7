"""safetensors files written piece by piece, and read again before they are used.

The library's own writer needs a second copy of everything in memory. Here names, shapes and dtypes are announced before
the first value, so that each tensor has its bytes in the file and is written there alone.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.store.layout import DTYPES, header_of

LIMIT = 4 << 30  # bytes of one file


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file of tensors on the host, piece by piece, in the order given."""
    yield header_of((name, dtype_name(t), tuple(t.shape), size(t)) for name, t in tensors.items())[0]
    for tensor in tensors.values():
        if tensor.numel():
            yield content_of(tensor)


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """The bytes of a tensor: `start` to `stop` of `file`, counted from its beginning."""

    file: str
    start: int
    stop: int


class TensorWriter:
    """Writes `tensors`, of which only names, shapes and dtypes are read, as their values come, in any order.

    A file can be opened by a reader only once it is complete: the length of its header is written last.

    Args:
        tensors: on the meta device, for example.
        file: the name where all fit into one file of `limit` bytes; several are numbered and have an index.
        metadata: for the header of each file.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        file: str = "model.safetensors",
        limit: int | None = LIMIT,
        metadata: Mapping[str, str] | None = None,
    ):
        self.file, self.tensors, self.metadata = file, dict(tensors), {"format": "pt", **(metadata or {})}
        self.bytes = sum(size(t) for t in self.tensors.values())
        self.places: dict[str, ByteRange] = {}
        self.digests: dict[str, str] = {}
        self._headers: dict[str, bytes] = {}
        groups = _divided(self.tensors, limit)
        for number, names in enumerate(groups):
            self._lay_out(file if len(groups) == 1 else _numbered(file, number + 1, len(groups)), names)
        self._missing = {part: {n for n, p in self.places.items() if p.file == part} for part in self._headers}

    def _lay_out(self, file: str, names: list[str]) -> None:
        ordered = [(name, self.tensors[name]) for name in sorted(names, key=lambda n: -self.tensors[n].element_size())]
        entries = ((name, dtype_name(t), tuple(t.shape), size(t)) for name, t in ordered)
        self._headers[file], spans = header_of(entries, self.metadata)
        self.places |= {name: ByteRange(file=file, start=start, stop=stop) for name, (start, stop) in spans.items()}

    def open(self, folder: Path) -> None:
        """Create the files, in their full size and without the length of the header."""
        self.folder = folder
        for part, header in self._headers.items():
            with (self.folder / part).open("xb") as file:
                file.truncate(max([len(header), *(p.stop for p in self.places.values() if p.file == part)]))
                file.write(bytes(8) + header[8:])
            self._close_if_complete(part)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the values of a tensor that was announced."""
        wanted = self.tensors.get(name)
        if wanted is None or wanted.shape != tensor.shape or wanted.dtype != tensor.dtype:
            announced = "none" if wanted is None else f"{wanted.dtype} {tuple(wanted.shape)}"
            raise CheckpointError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}; {announced} was announced")
        place, content = self.places[name], content_of(tensor)
        with (self.folder / place.file).open("r+b") as file:
            file.seek(place.start)
            file.write(content)
        self.digests[name] = xxhash.xxh3_128_hexdigest(content)
        self._missing[place.file].discard(name)
        self._close_if_complete(place.file)

    def _close_if_complete(self, part: str) -> None:
        if self._missing[part]:
            return
        with (self.folder / part).open("r+b") as file:
            file.write(self._headers[part][:8])
            file.flush()
            os.fsync(file.fileno())
            # `check` must read what the disk has, not what memory still has of it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Write the index. A tensor that has not come is an error."""
        absent = sorted(name for names in self._missing.values() for name in names)
        if absent:
            raise CheckpointError(f"{absent[0]} and {len(absent) - 1} more tensors never came")
        if len(self._headers) > 1:
            weight_map = {name: place.file for name, place in self.places.items()}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / f"{self.file}.index.json").write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Read everything again, one tensor at a time, and compare names, shapes, dtypes and every byte."""
        for part in self._headers:
            path = self.folder / part
            try:
                with safe_open(path, "pt") as file:
                    names = set(file.keys())
                if names != (wanted := {n for n, p in self.places.items() if p.file == part}):
                    raise CheckpointError(f"{path} does not hold what was written: {sorted(names ^ wanted)[:3]} differ")
                for name in sorted(wanted):
                    with safe_open(
                        path, "pt"
                    ) as file:  # opened again: an open file keeps every page that was looked at
                        self._compare(path, name, file.get_tensor(name))
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be read again: {error}") from None

    def _compare(self, path: Path, name: str, tensor: Tensor) -> None:
        wanted = self.tensors[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise CheckpointError(f"{path}: {name} is read as {tensor.dtype} {tuple(tensor.shape)}, not as written")
        if content_digest(tensor) != self.digests[name]:
            raise CheckpointError(f"{path}: {name} is read with other values than were written; is the disk sound?")


def dtype_name(tensor: Tensor) -> str:
    """Return the format's name of the dtype."""
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def size(tensor: Tensor) -> int:
    """Return the number of bytes of the values."""
    return tensor.numel() * tensor.element_size()


def content_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the host, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def content_digest(tensor: Tensor) -> str:
    """Return the digest of the bytes of a tensor on the host, as `TensorWriter.digests` has it."""
    return xxhash.xxh3_128_hexdigest(content_of(tensor))


def _divided(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """Return the names by file, none larger than `limit` unless one tensor is."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if limit is not None and files[-1] and filled + size(tensor) > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size(tensor)
    return files


def _numbered(file: str, number: int, of: int) -> str:
    return f"{file.removesuffix('.safetensors')}-{number:05d}-of-{of:05d}.safetensors"
