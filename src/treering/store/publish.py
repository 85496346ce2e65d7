"""A new folder, whole or not at all: made beside its name, synced, and moved there; room for it is looked at before."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from treering.core.collectives import from_first, is_first, together
from treering.core.errors import CheckpointError
from treering.store.tensor_writer import sync

SPARE = 16 << 20  # for a tokenizer and other small files
Do = Callable[[Callable[[], Any]], None]


def on_first(work: Callable[[], Any], doing: str, otherwise: str = "") -> None:
    """Rank 0 does `work`; what is wrong with it is said, and ends it, on every rank."""

    def told() -> str:
        if is_first():
            try:
                work()
            except (CheckpointError, ValueError) as error:  # transformers refuses settings with a ValueError
                return str(error) or type(error).__name__
        return ""

    if problem := together(told, doing, otherwise)[0]:
        raise CheckpointError(problem)


def refuse_taken(folder: Path) -> None:
    """Nothing is written over, or into, what is there already."""
    taken = "a file" if folder.exists() and not folder.is_dir() else ""
    if folder.is_dir() and any(folder.iterdir()):
        taken = "not empty"
    if taken:
        raise CheckpointError(f"{folder} is {taken}; give an export a folder of its own")


def refuse_full(folder: Path, need: int) -> None:
    """Before anything is written: whether there is a place that can be written, and has room."""
    parent = existing(folder)
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is a file, so {folder} cannot be made; export to another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} cannot be written to, so {folder} cannot be made; export to another place")
    if free(parent) < need + SPARE:
        raise CheckpointError(f"{_room(folder, need)}; make room, or export to another place")


def existing(folder: Path) -> Path:
    """The nearest thing above `folder` that there is."""
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def free(path: Path) -> int:
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize


def _room(folder: Path, need: int) -> str:
    parent = existing(folder)
    return f"{folder} needs {(need + SPARE) / 2**20:,.0f} MiB and {free(parent) / 2**20:,.0f} MiB are free in {parent}"


@contextmanager
def published(folder: Path, need: int) -> Iterator[tuple[Path, Do]]:
    """A temporary folder to fill by `do`, and moved to `folder` at the end: a killed export leaves nothing to load."""
    temporary = folder.with_name(f"{folder.name}.tmp-{from_first(uuid.uuid4().hex[:8])}")
    lock: list[int] = []

    def do(work: Callable[[], Any]) -> None:
        on_first(work, f"writing {folder}", f"; {_room(folder, need)}")

    def make() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        with suppress(OSError):  # where there are no locks, a killed export's folder stays
            lock.append(_locked(temporary))

    def finish() -> None:
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if folder.exists():
            folder.rmdir()
        os.rename(temporary, folder)
        sync(folder.parent)

    try:
        do(make)
        yield temporary, do
        do(finish)
    except BaseException:
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        for handle in lock:
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what killed exports to this name left: a living one holds a lock on its folder."""
    ours = re.compile(re.escape(folder.name) + r"\.tmp-[0-9a-f]{8}")
    for old in (path for path in folder.parent.iterdir() if ours.fullmatch(path.name)):
        with suppress(OSError):
            handle = _locked(old)
            shutil.rmtree(old, ignore_errors=True)
            os.close(handle)


def _locked(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
