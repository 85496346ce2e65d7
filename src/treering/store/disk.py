"""Every touch of the disk that a checkpoint makes, in one place: so that each can be made durable, and made to fail.

`crossing(point)` is called before each of them. It does nothing, unless a test has put something there to see what a
crash at that very moment leaves behind.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

BLOCK = 1 << 20

crossing: Callable[[str], None] = lambda point: None  # noqa: E731


def write(path: Path, pieces: Iterable[bytes | memoryview], point: str) -> tuple[int, str]:
    """Write a new file through to the disk. Returns its size and the xxh3 digests of its 1 MiB blocks, in hex."""
    blocks = Blocks()
    with path.open("xb") as file:
        for piece in pieces:
            crossing(f"{point}: write")
            file.write(piece)
            blocks.add(piece)
        crossing(f"{point}: flush")
        file.flush()
        os.fsync(file.fileno())
    return blocks.finish()


class Blocks:
    """Digests of 1 MiB blocks of what is added, wherever the pieces begin and end."""

    def __init__(self) -> None:
        self.size = 0
        self.done: list[str] = []
        self.words = xxhash.xxh3_64()

    def add(self, piece: bytes | memoryview) -> None:
        view = memoryview(piece).cast("B")
        while len(view):
            room = BLOCK - self.size % BLOCK
            self.words.update(view[:room])
            self.size += min(room, len(view))
            view = view[room:]
            if self.size % BLOCK == 0:
                self._close()

    def _close(self) -> None:
        self.done.append(self.words.hexdigest())
        self.words = xxhash.xxh3_64()

    def finish(self) -> tuple[int, str]:
        if self.size % BLOCK:
            self._close()
        return self.size, "".join(self.done)


def digests(path: Path) -> tuple[int, str]:
    """Of a file as it is on the disk, to be compared with what `write` returned."""
    blocks, buffer = Blocks(), memoryview(bytearray(BLOCK))  # one, as fresh memory costs more than the digest
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            blocks.add(buffer[:length])
    return blocks.finish()


def sync(folder: Path, point: str) -> None:
    """Until this returns, a power cut may forget the names in `folder`."""
    crossing(f"{point}: sync")
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(old: Path, new: Path, point: str) -> None:
    crossing(f"{point}: rename")
    os.rename(old, new)


def remove(folder: Path, point: str) -> None:
    """Take a checkpoint away. Its manifest goes first: what is left of it can never be taken for whole."""
    for path in sorted(folder.glob("*"), key=lambda path: path.name != "manifest.json"):
        crossing(f"{point}: remove")
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def free(path: Path) -> int:
    """Bytes that can still be written where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize
