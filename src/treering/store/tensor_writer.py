"""New safetensors files of a Hugging Face folder, written tensor by tensor and read again before they are believed.

Names, shapes and dtypes are told beforehand, so that every tensor has its place in a file before the first one comes:
each is written there and forgotten, and the memory this takes is that of one tensor. The length of a file's header,
without which no reader opens it, is the last thing written to it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treering.core.errors import CheckpointError

LIMIT = 4 << 30  # bytes of one file
# torch's names for dtypes -> safetensors' names
DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies: bytes `start` to `stop` of `file`, its header included."""

    file: str
    start: int
    stop: int


class Writer:
    """Writes `tensors` (on the meta device: only what they are is read) as their values come, in any order.

    `file` is the name where all fit into one of `limit` bytes; more are numbered, with an index beside them.
    `metadata` is written into the header of each file.
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
        self.places: dict[str, Place] = {}
        self.digests: dict[str, str] = {}
        self._heads: dict[str, bytes] = {}
        dealt = _deal(self.tensors, limit)
        for number, names in enumerate(dealt):
            own = file if len(dealt) == 1 else _numbered(file, number + 1, len(dealt))
            self._lay_out(own, names)
        self._missing = {own: {n for n, p in self.places.items() if p.file == own} for own in self._heads}

    def _lay_out(self, own: str, names: list[str]) -> None:
        """Widest elements first, as the format's own writer has them: so all are aligned."""
        header: dict[str, object] = {"__metadata__": self.metadata}
        spans, at = {}, 0
        for name in sorted(names, key=lambda n: -self.tensors[n].element_size()):
            tensor = self.tensors[name]
            spans[name] = at, at + size(tensor)
            dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": list(spans[name])}
            at = spans[name][1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._heads[own] = len(text).to_bytes(8, "little") + text
        before = len(self._heads[own])
        self.places |= {n: Place(file=own, start=a + before, stop=b + before) for n, (a, b) in spans.items()}

    def open(self, folder: Path) -> None:
        """Make the files, in their full size and without a header."""
        self.folder = folder
        for own, head in self._heads.items():
            with (self.folder / own).open("xb") as file:
                file.truncate(max([len(head), *(p.stop for p in self.places.values() if p.file == own)]))
                file.write(bytes(8) + head[8:])
            self._close_if_whole(own)

    def add(self, name: str, tensor: Tensor) -> None:
        wanted = self.tensors.get(name)
        if wanted is None or wanted.shape != tensor.shape or wanted.dtype != tensor.dtype:
            told = "none" if wanted is None else f"{wanted.dtype} {tuple(wanted.shape)}"
            raise CheckpointError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}; {told} was announced")
        place, content = self.places[name], content_of(tensor)
        with (self.folder / place.file).open("r+b") as file:
            file.seek(place.start)
            file.write(content)
        self.digests[name] = xxhash.xxh3_128_hexdigest(content)
        self._missing[place.file].discard(name)
        self._close_if_whole(place.file)

    def _close_if_whole(self, own: str) -> None:
        if self._missing[own]:
            return
        with (self.folder / own).open("r+b") as file:
            file.write(self._heads[own][:8])
            file.flush()
            os.fsync(file.fileno())
            # What is checked later is what the disk has, not what memory still holds of it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Write the index, and refuse to call it done while a tensor has not come."""
        absent = sorted(name for names in self._missing.values() for name in names)
        if absent:
            raise CheckpointError(f"{absent[0]} and {len(absent) - 1} more tensors never came")
        if len(self._heads) > 1:
            weight_map = {name: place.file for name, place in self.places.items()}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / f"{self.file}.index.json").write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Read everything again, as a stranger would, one tensor at a time: names, shapes, dtypes and every byte."""
        for own in self._heads:
            path = self.folder / own
            try:
                with safe_open(path, "pt") as file:
                    found = set(file.keys())
                if found != (wanted := {n for n, p in self.places.items() if p.file == own}):
                    raise CheckpointError(f"{path} does not hold what was written: {sorted(found ^ wanted)[:3]} differ")
                for name in sorted(wanted):
                    with safe_open(path, "pt") as file:  # anew: an open file keeps every page that was looked at
                        self._compare(path, name, file.get_tensor(name))
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be read again: {error}") from None

    def _compare(self, path: Path, name: str, found: Tensor) -> None:
        wanted = self.tensors[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise CheckpointError(f"{path}: {name} is read as {found.dtype} {tuple(found.shape)}, not as written")
        if xxhash.xxh3_128_hexdigest(content_of(found)) != self.digests[name]:
            raise CheckpointError(f"{path}: {name} is read with other values than were written; is the disk sound?")


def sync(path: Path) -> None:
    """Until this returns, a power cut may forget what was written to a file, or which names a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, without a copy where it lies in one piece."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _deal(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    files: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if limit is not None and files[-1] and held + size(tensor) > limit:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size(tensor)
    return files


def _numbered(file: str, number: int, of: int) -> str:
    return f"{file.removesuffix('.safetensors')}-{number:05d}-of-{of:05d}.safetensors"
