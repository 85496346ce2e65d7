"""Tokenised documents on disk: one safetensors file and one JSON manifest in a folder, published by a rename.

Written as a stream (memory does not grow with the data) and read through memory maps. A folder whose bytes do not
have the digest in its manifest is damaged: it is removed and written again.

What killed writers leave is removed by those that come later. Writers hold locks of the file system, which are the same
in every PID namespace and end with their process; where there are none, as on NFS, a folder's age decides.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
ABANDONED = 3600.0  # seconds without a touch after which a folder is nobody's, where no lock shows it
_PRIVATE = "treering-private-tokens-"

Arrays = Mapping[str, NDArray[Any]]


class CacheWriter:
    """Appends documents to raw files in a temporary folder, then joins them and renames the folder."""

    def __init__(self, folder: Path):
        self._final, self._documents, self._bytes = folder, 0, 0
        self._folder = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
        self._lock = ExitStack()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            self._lock.enter_context(disk.writing_in(folder.parent, _LEFTOVER))
            self._folder.mkdir()
            self._streams: dict[str, BinaryIO] = {name: (self._folder / name).open("wb") for name in _DTYPES}
        except OSError as error:
            raise DataError(f"data.cache: {folder.parent} cannot be written: {error.strerror}") from error
        self._waiting: list[Encoded] = []
        self._end = 0
        with self._writing():
            self._put("offsets", np.zeros(1, dtype="<i8"))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the disk into one that names the folder and how much it needs."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"data.cache: {self._folder} cannot be written: {error.strerror}; the {self._documents:,} documents so "
                f"far need {_mib(2 * self._bytes)}, half of it only until they are joined, and "
                f"{_mib(disk.free(self._final))} are free there; free some space, or name another folder"
            ) from error

    def add(self, documents: Sequence[Encoded]) -> None:
        """Append documents."""
        self._waiting.extend(documents)
        if len(self._waiting) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        documents, self._waiting = self._waiting, []
        if not documents:
            return
        self._documents += len(documents)
        with self._writing():
            self._put_all(documents)
            os.utime(self._folder)  # its age decides where there are no locks

    def _put_all(self, documents: Sequence[Encoded]) -> None:
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
        content = np.ascontiguousarray(values, dtype=_DTYPES[name][1]).tobytes()
        self._bytes += len(content)
        self._streams[name].write(content)

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Join the arrays, and rename the folder, unless another process has published the same cache meanwhile."""
        self._flush()
        with self._writing():
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
            with suppress(OSError):  # a full disk; what is in its buffer is not wanted any more
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
        try:
            folder.rename(renamed)
        except OSError as error:
            raise DataError(f"data.cache: {folder} is damaged and cannot be removed: {error.strerror}") from error
        shutil.rmtree(renamed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers have left next to the cache `folder`, and nothing of writers that may be alive."""
    with suppress(OSError), disk.writing_in(folder.parent, _LEFTOVER):
        if left := [path for path in folder.parent.iterdir() if _LEFTOVER.fullmatch(path.name)]:
            with tempfile.TemporaryFile(dir=folder.parent) as probe:  # by the clock of the file system
                now = os.fstat(probe.fileno()).st_mtime
            for path in left:
                if now - max(one.stat().st_mtime for one in (path, *path.iterdir())) > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)


class PrivateFolder:
    """A temporary folder that ends with this object; if its process was killed, the next such object removes it."""

    def __init__(self) -> None:
        try:
            for path in Path(tempfile.gettempdir()).glob(f"{_PRIVATE}*"):
                with suppress(OSError):
                    _remove_if_nobodys(path)
            while not self._made():
                pass
        except OSError as error:
            raise DataError(
                f"data.cache is null, and no temporary folder can be made: {error.strerror}; set TMPDIR or data.cache"
            ) from error

    def _made(self) -> bool:
        """Make the folder and lock it. Return whether it is there: another process may have taken it for a leftover."""
        self._folder = tempfile.TemporaryDirectory(prefix=_PRIVATE, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks, on which nobody removes anything
            return True
        return self.path.is_dir()


def _remove_if_nobodys(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid == os.getuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


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
