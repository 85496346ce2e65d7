"""Files by name: regular, inside their folder, of bounded size, and JSON of bounded depth."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError

MAX_JSON = 64 << 20
_DEEP = 64
_MANY = 8 << 20  # values of one file: a value costs Python up to a hundred bytes, however short it is written


def basename(name: Any, file: Path) -> str:
    """Return `name` if it is the plain name of a file in the same folder; else raise CheckpointError."""
    safe = isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..")
    if not safe or any(c in name for c in "/\\\0:"):
        shown = str(name)[:80]
        raise CheckpointError(f"{file} names the file {shown!r}; only plain names in the same folder are read")
    return name


def in_folder(folder: Path, name: str) -> Path | None:
    """Return the path of the regular file `name` of a folder, or None. A link that leads out of the folder is refused.

    The hub's own cache is the exception: there every file is a link from `snapshots/…` to `blobs/` of the same model.
    """
    path = folder / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which is not there") from None
        return None
    except OSError as error:  # a link to itself, a folder that may not be entered
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is a pipe, a socket or a device, not a file; refused")
    target, home = path.resolve(), folder.resolve()
    if target.parent != home and home not in target.parents:
        cached = home.parent.name == "snapshots" and home.parent.parent / "blobs" in target.parents
        if not cached:
            raise CheckpointError(
                f"{path} is a link that leads out of its folder, to {target}; refused: put a copy of the file there"
            )
    return path


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """Return the content of a JSON file that holds a mapping."""
    value = parse_json(read_bytes(path, most), path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a mapping, it is a {type(value).__name__}; it cannot be used")
    return value


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes."""
    try:
        # Not to wait: a pipe that took the file's place would block for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise CheckpointError(f"{path} is not a regular file; refused")
            if state.st_size > most:
                raise CheckpointError(f"{path} is larger than {most:,} bytes ({state.st_size:,}); refused")
            return file.read(most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(data: bytes, path: Path, hook: Any = None) -> Any:
    """Return parsed JSON of bounded size and depth. `hook` is given the pairs of each mapping and returns it."""
    if sum(data.count(mark) for mark in b",{[") > _MANY:
        raise CheckpointError(f"{path} holds more than {_MANY:,} values; refused")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({type(error).__name__}: {str(error)[:120]})") from None
    if _depth(value) > _DEEP:
        raise CheckpointError(f"{path} is nested more than {_DEEP} deep; refused")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while (level := [v for v in level if isinstance(v, dict | list)]) and depth <= _DEEP:
        depth += 1
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return depth
