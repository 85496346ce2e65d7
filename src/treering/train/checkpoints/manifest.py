"""The manifest of a checkpoint: a schema with limits, digests, and a check that every row of every tensor is present.

Format 3 differs from 2 by `prepared`: some tensors of the run are in prepared results, named by their digests. A
checkpoint that holds everything is written in format 2.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError
from treering.store.layout import BITS, DTYPES

SELF_CONTAINED, FORMAT = 2, 3
NAME = "manifest.json"
LARGEST = 256 << 20  # bytes of a manifest
WIDTHS = {dtype: BITS[name] // 8 for dtype, name in DTYPES.items()}  # bytes of an element


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows `start` to `stop` of dimension 0, in `file` under the tensor's name."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    bytes: int
    blocks: str  # xxh3-64 of each 1 MiB block, in hex, one after another


@dataclass(frozen=True, kw_only=True)
class Manifest:
    step: int
    world: int
    facts: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    prepared: Mapping[str, str] = field(default_factory=dict)  # label of a prepared result -> its digest

    def dump(self) -> bytes:
        """Return the bytes of the file: the content with its sha256, so that a damaged manifest is recognized."""
        content = {"format": FORMAT, **asdict(self)}
        if not self.prepared:
            content["format"] = SELF_CONTAINED
            del content["prepared"]
        body = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "content": body}).encode()


def load(folder: Path) -> Manifest:
    """Return the manifest of `folder`. One that does not match the schema is a CheckpointError."""
    path = folder / NAME
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} is larger than any manifest")
        outer = json.loads(path.read_bytes())
        body = outer["content"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{path} is not what was written: its sha256 differs")
        content = json.loads(body)
        if content["format"] not in (SELF_CONTAINED, FORMAT):
            raise CheckpointError(
                f"{path} has format {content['format']!r}; this version reads {SELF_CONTAINED} and {FORMAT}"
            )
        manifest = Manifest(
            step=_count(content["step"]),
            world=_count(content["world"], least=1),
            facts=dict(content["facts"]),
            files={_basename(name): _file(about) for name, about in content["files"].items()},
            tensors={name: _entry(entry) for name, entry in content["tensors"].items()},
            prepared=_digests(content["prepared"]) if content["format"] == FORMAT else {},
        )
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest ({type(error).__name__}: {error})") from None
    for name, entry in manifest.tensors.items():
        _check_covered(folder, name, entry, manifest.files)
    return manifest


def _file(value: Mapping[str, Any]) -> FileEntry:
    return FileEntry(bytes=_count(value["bytes"]), blocks=str(value["blocks"]))


def _digests(value: Mapping[str, Any]) -> dict[str, str]:
    for digest in value.values():
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise ValueError(f"{digest!r} is not the digest of a prepared result")
    return dict(value)


def _entry(value: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(_count(size) for size in value["shape"])
    if value["dtype"] not in DTYPES or math.prod(shape) >= 1 << 50:
        raise ValueError(f"a tensor of {value['dtype']!r} and shape {shape}")
    chunks = tuple(
        Chunk(file=_basename(c["file"]), start=_count(c["start"]), stop=_count(c["stop"])) for c in value["chunks"]
    )
    return TensorEntry(shape=shape, dtype=value["dtype"], chunks=chunks)


def _check_covered(folder: Path, name: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    """Check that the chunks are the rows 0 to the last, each once: a hole would leave first values."""
    at = 0
    for chunk in sorted(entry.chunks, key=lambda c: (c.start, c.stop)):
        if chunk.file not in files:
            raise CheckpointError(
                f"{folder}: {name} should lie in {chunk.file!r}, which is not a file of this checkpoint"
            )
        if chunk.start != at or chunk.stop < at:
            raise CheckpointError(f"{folder}: rows {at} to {chunk.start} of {name} are in no file, or in two")
        at = chunk.stop
    if at != entry.rows:
        raise CheckpointError(f"{folder}: rows {at} to {entry.rows} of {name} are in no file")


def _count(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 62:
        raise ValueError(f"{value!r} where a count should be")
    return value


def _basename(name: Any) -> str:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{name!r} is not the plain name of a file")
    return name
