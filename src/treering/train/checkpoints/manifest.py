"""What a checkpoint says of itself, and why it can be believed: a schema with limits, digests, proof of coverage."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError

FORMAT = 2
NAME = "manifest.json"
LARGEST = 256 << 20  # bytes of a manifest
DTYPES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows `start` to `stop` of dimension 0, in `file` under the tensor's name."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True, kw_only=True)
class File:
    bytes: int
    blocks: str  # xxh3-64 of each 1 MiB block, in hex, one after another


@dataclass(frozen=True, kw_only=True)
class Manifest:
    step: int
    world: int
    facts: Mapping[str, Any]
    files: Mapping[str, File]
    tensors: Mapping[str, Entry]

    def dump(self) -> bytes:
        """As it lies on the disk: the content with its sha256, so that a manifest cannot be half right either."""
        body = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":"))
        return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "content": body}).encode()


def load(folder: Path) -> Manifest:
    """Read and check the manifest of `folder`; anything strange is a CheckpointError that names it."""
    path = folder / NAME
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} is larger than any manifest")
        outer = json.loads(path.read_bytes())
        body = outer["content"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{path} is not what was written: its sha256 differs")
        content = json.loads(body)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']!r}; this version reads {FORMAT}")
        made = Manifest(
            step=_whole(content["step"]),
            world=_whole(content["world"], least=1),
            facts=dict(content["facts"]),
            files={_basename(name): _file(about) for name, about in content["files"].items()},
            tensors={name: _entry(entry) for name, entry in content["tensors"].items()},
        )
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest ({type(error).__name__}: {error})") from None
    for name, entry in made.tensors.items():
        _check_covered(folder, name, entry, made.files)
    return made


def _file(found: Mapping[str, Any]) -> File:
    return File(bytes=_whole(found["bytes"]), blocks=str(found["blocks"]))


def _entry(found: Mapping[str, Any]) -> Entry:
    shape = tuple(_whole(size) for size in found["shape"])
    if found["dtype"] not in DTYPES or math.prod(shape) >= 1 << 50:
        raise ValueError(f"a tensor of {found['dtype']!r} and shape {shape}")
    chunks = tuple(
        Chunk(file=_basename(c["file"]), start=_whole(c["start"]), stop=_whole(c["stop"])) for c in found["chunks"]
    )
    return Entry(shape=shape, dtype=found["dtype"], chunks=chunks)


def _check_covered(folder: Path, name: str, entry: Entry, files: Mapping[str, File]) -> None:
    """The chunks are the rows 0 to the last, each once: a hole would leave first values, an overlap hide one."""
    at = 0
    for chunk in sorted(entry.chunks, key=lambda c: (c.start, c.stop)):
        if chunk.file not in files:
            raise CheckpointError(f"{folder}: {name} is said to lie in {chunk.file!r}, which is not of this checkpoint")
        if chunk.start != at or chunk.stop < at:
            raise CheckpointError(f"{folder}: rows {at} to {chunk.start} of {name} are in no file, or in two")
        at = chunk.stop
    if at != entry.rows:
        raise CheckpointError(f"{folder}: rows {at} to {entry.rows} of {name} are in no file")


def _whole(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 62:
        raise ValueError(f"{value!r} where a count should be")
    return value


def _basename(name: Any) -> str:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{name!r} is not the plain name of a file")
    return name
