"""Tokenised documents on disk: one safetensors file and one JSON manifest in a folder, published by a rename.

Written as a stream (memory does not grow with the data) and read through memory maps. A folder whose bytes do not
have the digest in its manifest is damaged: it is removed and written again.
"""

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import CheckpointError, DataError
from treering.data.encode import Encoded
from treering.store import disk
from treering.store.layout import header_of
from treering.store.untrusted import read_header

_TOKENS, _MANIFEST = "tokens.safetensors", "manifest.json"
_DTYPES = {"ids": ("U32", "<u4"), "mask": ("BOOL", "|b1")}
_DTYPES |= dict.fromkeys(("offsets", "rows", "trained"), ("I64", "<i8"))
_DTYPES |= dict.fromkeys(("files", "pieces"), ("I32", "<i4"))
_LEFTOVER = re.compile(r".+\.(tmp|old)-[0-9a-f]{32}")
_FLUSH = 512  # documents written at once

Arrays = Mapping[str, NDArray[Any]]


class CacheWriter:
    """Appends documents to raw files in a temporary folder, then joins them and renames the folder."""

    def __init__(self, folder: Path):
        self._final = folder
        self._folder = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
        self._lock = ExitStack()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(disk.writing_in(folder.parent, _LEFTOVER))
            self._folder.mkdir()
        except OSError as error:
            raise DataError(f"data.cache: {folder.parent} cannot be written: {error.strerror}") from error
        self._streams: dict[str, BinaryIO] = {name: (self._folder / name).open("wb") for name in _DTYPES}
        self._waiting: list[Encoded] = []
        self._end = 0
        self._put("offsets", np.zeros(1, dtype="<i8"))

    def add(self, documents: Sequence[Encoded]) -> None:
        """Append documents."""
        self._waiting.extend(documents)
        if len(self._waiting) >= _FLUSH:
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
        """Join the arrays, and rename the folder, unless another process has published the same cache meanwhile."""
        self._flush()
        for stream in self._streams.values():
            stream.close()
        path = self._folder / _TOKENS
        disk.write(path, self._pieces())
        for name in _DTYPES:
            (self._folder / name).unlink()
        complete = {**manifest, "digest": disk.digest(path), "bytes": path.stat().st_size}
        disk.write(self._folder / _MANIFEST, [json.dumps(complete).encode()])
        try:
            disk.publish(self._folder, self._final)
        except OSError:
            # Another process was faster. What it published is the same, because the name is the key.
            if not (self._final / _MANIFEST).is_file():
                raise
            self.discard()
        self._lock.close()

    def discard(self) -> None:
        """Remove what was written."""
        for stream in self._streams.values():
            stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _pieces(self) -> Iterator[bytes | memoryview]:
        sizes = {name: (self._folder / name).stat().st_size for name in _DTYPES}
        arrays = (
            (name, kind, (sizes[name] // np.dtype(dtype).itemsize,), sizes[name])
            for name, (kind, dtype) in _DTYPES.items()
        )
        # The digest of the file identifies the data of a run, so its bytes stay as the first version wrote them.
        yield header_of(arrays, separators=(", ", ": "))[0]
        for name in _DTYPES:
            yield from disk.pieces_of(self._folder / name)


def read(folder: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Return arrays (memory maps) and manifest, or None if there is no intact cache in `folder`."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        path = folder / _TOKENS
        if manifest["bytes"] != path.stat().st_size or manifest["digest"] != disk.digest(path):
            return None
        return _map(path), manifest
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None


def remove(folder: Path) -> None:
    """Remove a cache. It is renamed first, so that no reader opens half of it."""
    if folder.exists():
        renamed = folder.with_name(f"{folder.name}.old-{uuid.uuid4().hex}")
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def _map(path: Path) -> Arrays:
    """Return the arrays of a file. ValueError if they are not those of a cache."""
    headers = {header.name: header for header in read_header(path)}
    if {name: header.dtype for name, header in headers.items()} != {n: kind for n, (kind, _) in _DTYPES.items()}:
        raise ValueError(f"{path} does not have the arrays of a token cache")
    begin = path.stat().st_size - sum(header.bytes for header in headers.values())
    arrays = {}
    for name, (_, dtype) in _DTYPES.items():
        header = headers[name]
        empty = np.zeros(0, dtype=dtype)
        arrays[name] = np.memmap(path, dtype, "r", begin + header.start, header.shape) if header.elements else empty
    return arrays
