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
from treering.store.untrusted import MOST_VALUES, in_folder, parse_json, read_bytes, visible

SELF_CONTAINED, FORMAT = 2, 3
NAME = "manifest.json"
LARGEST = 256 << 20  # bytes of a manifest
_LISTS = ("techniques", "dtype")  # of the identity
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
    path = in_folder(folder, NAME)
    if path is None:
        raise CheckpointError(f"{folder} has no {NAME}: it was never finished")
    try:
        outer = _parsed(read_bytes(path, LARGEST), path)
        body = outer["content"].encode()
        if hashlib.sha256(body).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{path} is not what was written: its sha256 differs")
        content = _parsed(body, path)
        if content["format"] not in (SELF_CONTAINED, FORMAT):
            raise CheckpointError(
                f"{path} has format {str(content['format'])[:40]!r}; this version reads {SELF_CONTAINED} and {FORMAT}"
            )
        manifest = Manifest(
            step=_count(content["step"]),
            world=_count(content["world"], least=1),
            facts=_facts(content["facts"]),
            files={_basename(name): _file(about) for name, about in content["files"].items()},
            tensors={name: _entry(entry) for name, entry in content["tensors"].items()},
            prepared=_digests(content["prepared"]) if content["format"] == FORMAT else {},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a manifest ({type(error).__name__}: {visible(str(error))[:300]})"
        ) from None
    for name, entry in manifest.tensors.items():
        _check_covered(folder, visible(name), entry, manifest.files)
    return manifest


def _parsed(data: bytes, path: Path) -> Any:
    # A chunk, of which there is one for every tensor and rank, is four values in sixty bytes.
    return parse_json(data, path, most=max(MOST_VALUES, len(data) // 8))


def _facts(value: Any) -> dict[str, Any]:
    """Return the facts of a checkpoint if those that are read again have the form in which they are written."""
    facts = _mapping(value, "facts")
    identity = _mapping(facts.get("identity", {}), "facts.identity")
    for name, entry in identity.items():
        listed = isinstance(entry, list) and all(isinstance(one, str) for one in entry)
        if listed if name in _LISTS else _is_scalar(entry):
            continue
        if name in _LISTS or not listed:
            raise ValueError(f"facts.identity.{name} is {str(entry)[:80]!r}")
    for name, entry in _mapping(facts.get("counts", {}), "facts.counts").items():
        if not _is_scalar(entry):
            raise ValueError(f"facts.counts.{name} is {str(entry)[:80]!r}")
    return facts


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {str(value)[:80]!r}, not a mapping")
    return dict(value)


def _is_scalar(value: Any) -> bool:
    number = isinstance(value, int | float) and abs(value) < 1 << 63  # neither of thousands of digits, nor NaN
    return value is None or isinstance(value, str) or number


def _file(value: Mapping[str, Any]) -> FileEntry:
    if not isinstance(value["blocks"], str):
        raise ValueError(f"blocks is {str(value['blocks'])[:40]!r}")
    return FileEntry(bytes=_count(value["bytes"]), blocks=value["blocks"])


def _digests(value: Mapping[str, Any]) -> dict[str, str]:
    for digest in value.values():
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise ValueError(f"{digest!r} is not the digest of a prepared result")
    return dict(value)


def _entry(value: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(_count(size) for size in value["shape"])
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES or len(shape) > 16 or math.prod(shape) >= 1 << 50:
        raise ValueError(f"a tensor of {str(dtype)[:40]!r} and shape {str(shape)[:80]}")
    chunks = tuple(
        Chunk(file=_basename(c["file"]), start=_count(c["start"]), stop=_count(c["stop"])) for c in value["chunks"]
    )
    return TensorEntry(shape=shape, dtype=dtype, chunks=chunks)


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
        raise ValueError(f"{str(value)[:40]!r} where a count should be")
    return value


def _basename(name: Any) -> str:
    plain = isinstance(name, str) and os.path.basename(name) == name and name not in ("", ".", "..")
    if not plain or len(name) > 255 or not name.isprintable() or any(c in name for c in "\\:"):
        raise ValueError(f"{str(name)[:80]!r} is not the plain name of a file")
    return name
