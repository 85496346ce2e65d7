"""Durable files and folders: written through to the disk, published by one rename, leftovers removed.

`crossing(point)` is called before each touch of the disk that a checkpoint makes. It does nothing, unless a test
replaces it to see what a crash at that moment leaves behind.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

BLOCK = 1 << 20

crossing: Callable[[str], None] = lambda point: None  # noqa: E731


class Blocks:
    """Digests of the 1 MiB blocks of a content that is added in pieces of any length."""

    def __init__(self) -> None:
        self.size = 0
        self.done: list[str] = []
        self.words = xxhash.xxh3_64()

    def add(self, piece: bytes | memoryview) -> None:
        """Digest the next piece of the content."""
        view = memoryview(piece).cast("B")
        while len(view):
            left = BLOCK - self.size % BLOCK
            self.words.update(view[:left])
            self.size += min(left, len(view))
            view = view[left:]
            if self.size % BLOCK == 0:
                self._close()

    def _close(self) -> None:
        self.done.append(self.words.hexdigest())
        self.words = xxhash.xxh3_64()

    def finish(self) -> tuple[int, str]:
        """Return the number of bytes and the digests of all blocks, in hex."""
        if self.size % BLOCK:
            self._close()
        return self.size, "".join(self.done)


def write(
    path: Path, pieces: Iterable[bytes | memoryview], point: str = "", *, digested: bool = True
) -> tuple[int, str]:
    """Write a new file through to the disk. Returns its size and the xxh3 digests of its 1 MiB blocks, in hex: those of
    nothing unless `digested`, for a writer that has a digest of its own."""
    blocks = Blocks()
    with path.open("xb") as file:
        for piece in pieces:
            _cross(point, "write")
            file.write(piece)
            if digested:
                blocks.add(piece)
        _cross(point, "flush")
        file.flush()
        os.fsync(file.fileno())
    return blocks.finish()


def replace(path: Path, content: bytes) -> None:
    """Replace the content of the file `path` by one rename: a process killed meanwhile leaves the old content."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    write(temporary, [content])
    os.replace(temporary, path)
    sync(path.parent)


def digests(path: Path) -> tuple[int, str]:
    """Return the size and digests of a file as it is on the disk now, in the form that `write` returns."""
    blocks = Blocks()
    for piece in pieces_of(path):
        blocks.add(piece)
    return blocks.finish()


def digest(path: Path) -> str:
    """Return one digest of a complete file."""
    words = xxhash.xxh3_128()
    for piece in pieces_of(path):
        words.update(piece)
    return words.hexdigest()


def pieces_of(path: Path) -> Iterator[memoryview]:
    """Yield the content of a file by blocks, each valid until the next one."""
    buffer = memoryview(bytearray(BLOCK))  # one, as fresh memory costs more than the digest
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            yield buffer[:length]


def sync(path: Path, point: str = "") -> None:
    """Write the content of a file, or the names in a folder, to the disk: until then a power cut may lose them."""
    _cross(point, "sync")
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(old: Path, new: Path, point: str = "") -> None:
    """Rename a file or folder."""
    _cross(point, "rename")
    os.rename(old, new)


def publish(temporary: Path, final: Path, points: tuple[str, str, str] = ("", "", "")) -> None:
    """Rename a folder whose files are on the disk to its final name: it exists completely, or not at all."""
    sync(temporary, points[0])
    move(temporary, final, points[1])
    sync(final.parent, points[2])


def remove(folder: Path, point: str = "") -> None:
    """Remove a published folder. Its manifest is removed first, so that the rest is never taken for complete."""
    for path in sorted(folder.glob("*"), key=lambda path: path.name != "manifest.json"):
        _cross(point, "remove")
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def writing_in(folder: Path, leftovers: re.Pattern[str]) -> Iterator[None]:
    """Remove the `leftovers` of killed writers from `folder`, unless another writer works in it; then be a writer.

    Writers share a lock on the folder. Where a file system has no locks, nothing is removed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in [path for path in folder.iterdir() if leftovers.fullmatch(path.name)]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free(path: Path) -> int:
    """Return how many bytes can still be written where `path` is, or would be."""
    state = os.statvfs(existing(path))
    return state.f_bavail * state.f_frsize


def _cross(point: str, what: str) -> None:
    if point:
        crossing(f"{point}: {what}")
