"""Files by name: regular, inside their folder, of bounded size; JSON of bounded depth; headers of safetensors files.

The safetensors library refuses holes, overlaps and sizes that do not fit their shapes. It takes the later of two
tensors with one name, and parses a header of 100 MB whatever is in it; here both are refused too, before the library
maps the file, and every refusal names the file.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError
from treering.store.layout import BITS

MAX_JSON = 64 << 20
_DEEP = 64
MOST_VALUES = 8 << 20  # values of one file: a value costs Python up to a hundred bytes, however short it is written
MAX_HEADER = 100_000_000  # the limit of the format's own reader


def visible(text: str) -> str:
    """Return `text` with each character escaped that a terminal obeys or does not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def basename(name: Any, file: Path) -> str:
    """Return `name` if it is the plain name of a file in the same folder; else raise CheckpointError."""
    safe = isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..")
    if not safe or any(c in name for c in "/\\\0:"):
        raise CheckpointError(f"{file} names the file {str(name)[:80]!r}; only plain names in the same folder are read")
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
        # Not to wait: a pipe that took the file's place would block without end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise CheckpointError(f"{path} is not a regular file; refused")
            if state.st_size > most:
                raise CheckpointError(f"{path} is larger than {most:,} bytes ({state.st_size:,}); refused")
            return file.read(most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(data: bytes, path: Path, hook: Any = None, most: int = MOST_VALUES) -> Any:
    """Return parsed JSON of bounded size and depth. `hook` is given the pairs of each mapping and returns it."""
    if sum(data.count(mark) for mark in b",{[") > most:
        raise CheckpointError(f"{path} holds more than {most:,} values; refused")
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


@dataclass(frozen=True, kw_only=True)
class Header:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int  # within the file's data

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> list[Header]:
    """Return the tensors of a safetensors file, in the order of their names. No value is read."""
    entries, length = _entries(file)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(file, "its metadata are not texts")
    headers = [_entry(file, name, entry, length) for name, entry in sorted(entries.items())]
    end = 0
    for tensor in sorted(headers, key=lambda t: (t.start, t.bytes)):
        if tensor.start != end:
            what = "overlaps another tensor" if tensor.start < end else "lies behind bytes of no tensor"
            raise _damaged(file, f"{tensor.name[:80]!r} {what}")
        end += tensor.bytes
    if end != length:
        raise _damaged(file, f"its tensors have {end:,} bytes, the file {length:,}")
    return headers


def _entries(file: Path) -> tuple[dict[str, Any], int]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise _damaged(file, f"its header would be {length:,} bytes of {size:,}")
            data = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    entries = parse_json(data, file, lambda pairs: _unique(pairs, file))
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is not a mapping")
    return entries, size - 8 - length


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _damaged(file, "a name stands twice in its header")
    return entries


def _entry(file: Path, name: str, entry: Any, length: int) -> Header:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in BITS and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise _damaged(file, f"the entry of {name[:80]!r} is not one of a tensor")
    start, stop = offsets
    if not start <= stop <= length:
        raise _damaged(
            file, f"{name[:80]!r} would lie at {start:,} to {stop:,} of {length:,} bytes; is the file cut off?"
        )
    if math.prod(shape) * BITS[dtype] != (stop - start) * 8:
        raise _damaged(file, f"{name[:80]!r} has {stop - start:,} bytes for the shape {shape} of {dtype}")
    return Header(name=name, dtype=dtype, shape=tuple(shape), bytes=stop - start, start=start)


def _sizes(value: Any) -> bool:
    # Few and below 2^63 each: their product must stay cheap.
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a complete safetensors file: {reason}")
