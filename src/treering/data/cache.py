"""Tokenised documents on disk: one safetensors file and one JSON manifest in a folder, published by a rename.

Written as a stream (memory does not grow with the data) and read through memory maps. A folder whose bytes do not
have the digest in its manifest is no cache: it is removed and made again.
"""

import json
import os
import shutil
import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from treering.core.errors import DataError
from treering.data.encode import Encoded

_TOKENS, _MANIFEST = "tokens.safetensors", "manifest.json"
_DTYPES = {"ids": ("U32", "<u4"), "mask": ("BOOL", "|b1")}
_DTYPES |= dict.fromkeys(("offsets", "rows", "trained"), ("I64", "<i8"))
_DTYPES |= dict.fromkeys(("files", "pieces"), ("I32", "<i4"))
_HEADER_LIMIT = 1 << 16
_CHUNK = 1 << 22
_TOGETHER = 512  # documents written at once

Arrays = Mapping[str, NDArray[Any]]


class Writer:
    """Appends documents to raw files beside the final place, then joins them and renames the folder."""

    def __init__(self, folder: Path):
        self._final = folder
        self._folder = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"data.cache: {folder.parent} cannot be written: {error.strerror}") from error
        self._streams: dict[str, BinaryIO] = {name: (self._folder / name).open("wb") for name in _DTYPES}
        self._waiting: list[Encoded] = []
        self._end = 0
        self._put("offsets", np.zeros(1, dtype="<i8"))

    def add(self, documents: Sequence[Encoded]) -> None:
        self._waiting.extend(documents)
        if len(self._waiting) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        documents, self._waiting = self._waiting, []
        if not documents:
            return
        self._put("ids", np.concatenate([d.ids for d in documents]))
        self._put("mask", np.concatenate([d.mask for d in documents]))
        ends = self._end + np.cumsum([len(d.ids) for d in documents])
        self._end = int(ends[-1])
        self._put("offsets", ends)
        self._put("trained", np.array([np.count_nonzero(d.mask) for d in documents]))
        self._put("files", np.array([d.file for d in documents]))
        self._put("rows", np.array([d.row for d in documents]))
        self._put("pieces", np.array([d.piece for d in documents]))

    def _put(self, name: str, values: NDArray[Any]) -> None:
        self._streams[name].write(np.ascontiguousarray(values, dtype=_DTYPES[name][1]).tobytes())

    def publish(self, manifest: Mapping[str, Any]) -> None:
        self._flush()
        for stream in self._streams.values():
            stream.close()
        path = self._folder / _TOKENS
        self._join(path)
        stated = {**manifest, "digest": _digest(path), "bytes": path.stat().st_size}
        with (self._folder / _MANIFEST).open("w", encoding="utf-8") as out:
            json.dump(stated, out)
            out.flush()
            os.fsync(out.fileno())
        try:
            self._folder.rename(self._final)
        except OSError:
            # Another process was faster. What it published is the same, because the name is the key.
            if not (self._final / _MANIFEST).is_file():
                raise
            self.discard()

    def discard(self) -> None:
        for stream in self._streams.values():
            stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _join(self, path: Path) -> None:
        header: dict[str, Any] = {}
        at = 0
        for name, (kind, dtype) in _DTYPES.items():
            size = (self._folder / name).stat().st_size
            header[name] = {
                "dtype": kind,
                "shape": [size // np.dtype(dtype).itemsize],
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format wants tensors aligned
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in _DTYPES:
                with (self._folder / name).open("rb") as part:
                    shutil.copyfileobj(part, out, _CHUNK)
                (self._folder / name).unlink()
            out.flush()
            os.fsync(out.fileno())


def read(folder: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Arrays (memory maps) and manifest, or None if there is no intact cache in `folder`."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        path = folder / _TOKENS
        if manifest["bytes"] != path.stat().st_size or manifest["digest"] != _digest(path):
            return None
        return _map(path), manifest
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(folder: Path) -> None:
    """Out of the way first: a reader never sees half of it."""
    if folder.exists():
        away = folder.with_name(f"{folder.name}.old-{uuid.uuid4().hex}")
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _map(path: Path) -> Arrays:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _HEADER_LIMIT:
            raise ValueError("header too long")
        header = json.loads(stream.read(length))
    arrays = {}
    for name, (kind, dtype) in _DTYPES.items():
        entry = header[name]
        begin, end = entry["data_offsets"]
        count = (end - begin) // np.dtype(dtype).itemsize
        if entry["dtype"] != kind:
            raise ValueError(f"{name} has the wrong type")
        empty = np.zeros(0, dtype=dtype)
        arrays[name] = np.memmap(path, dtype, "r", 8 + length + begin, (count,)) if count else empty
    return arrays


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while part := stream.read(_CHUNK):
            state.update(part)
    return state.hexdigest()
