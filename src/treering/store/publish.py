"""A new folder written by all ranks: checked for space, written under a temporary name, published at the end."""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from treering.core.collectives import from_first, is_first, together
from treering.core.errors import CheckpointError
from treering.store import disk
from treering.store.disk import existing, free

SPARE = 16 << 20  # for a tokenizer and other small files
RunOnFirst = Callable[[Callable[[], Any]], None]


def on_first(work: Callable[[], Any], doing: str, otherwise: str = "") -> None:
    """RunOnFirst `work` on rank 0; its error is raised on every rank."""

    def problem() -> str:
        if is_first():
            try:
                work()
            except (CheckpointError, ValueError) as error:  # transformers refuses settings with a ValueError
                return str(error) or type(error).__name__
        return ""

    if text := together(problem, doing, otherwise)[0]:
        raise CheckpointError(text)


def refuse_taken(folder: Path) -> None:
    """Raise CheckpointError if there is something at `folder` already."""
    taken = "a file" if folder.exists() and not folder.is_dir() else ""
    if folder.is_dir() and any(folder.iterdir()):
        taken = "not empty"
    if taken:
        raise CheckpointError(f"{folder} is {taken}; give an export a folder of its own")


def refuse_full(folder: Path, need: int) -> None:
    """Raise CheckpointError if `folder` cannot be made with `need` bytes in it."""
    parent = existing(folder.absolute().parent)
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is a file, so {folder} cannot be made; export to another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} cannot be written to, so {folder} cannot be made; export to another place")
    if free(parent) < need + SPARE:
        raise CheckpointError(f"{_space(folder, need)}; free some space, or export to another place")


def _space(folder: Path, need: int) -> str:
    parent = existing(folder.absolute().parent)
    return f"{folder} needs {(need + SPARE) / 2**20:,.0f} MiB and {free(parent) / 2**20:,.0f} MiB are free in {parent}"


@contextmanager
def published(folder: Path, need: int) -> Iterator[tuple[Path, RunOnFirst]]:
    """Yield a temporary folder and a function that does work in it on rank 0; publish it as `folder` at the end.

    An export that is killed leaves nothing that loads; the next one to the same parent removes what it left.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{from_first(uuid.uuid4().hex[:8])}")
    stack = ExitStack()

    def do(work: Callable[[], Any]) -> None:
        on_first(work, f"writing {folder}", f"; {_space(folder, need)}")

    def make() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(disk.writing_in(folder.parent, leftovers(folder)))
        temporary.mkdir()

    def finish() -> None:
        for path in temporary.iterdir():
            disk.sync(path)
        if folder.exists():
            folder.rmdir()
        disk.publish(temporary, folder)

    with stack:
        try:
            do(make)
            yield temporary, do
            do(finish)
        except BaseException:
            if is_first():
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def leftovers(folder: Path) -> re.Pattern[str]:
    """Return the pattern of the temporary names of exports to `folder`."""
    return re.compile(re.escape(folder.name) + r"\.tmp-[0-9a-f]{8}")
