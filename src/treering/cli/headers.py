"""The headers of safetensors files and small JSON files, read with every length and name doubted.

A header says names, dtypes and shapes; the values after it are not touched, so a file of any size takes a moment.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.cli.text import plain, short
from treering.errors import CheckpointError

MAX_HEADER = 100_000_000  # the limit of the format's own reader
MAX_JSON = 50_000_000
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> list[Header]:
    """The tensors of a safetensors file, in the order of their names."""
    whole = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if whole < 8 or not 2 <= length <= min(MAX_HEADER, whole - 8):
            raise _damaged(file, f"its header would be {length:,} bytes of {whole:,}")
        entries = _json(stream.read(length), file)
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is not a mapping")
    return [_entry(file, n, e, whole - 8 - length) for n, e in sorted(entries.items()) if n != "__metadata__"]


def _entry(file: Path, name: str, entry: Any, room: int) -> Header:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in BITS and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise _damaged(file, f"the entry of {short(name)} is not one of a tensor")
    start, stop = offsets
    if not start <= stop <= room:
        raise _damaged(
            file, f"{short(name)} would lie at {start:,} to {stop:,} of {room:,} bytes; is the file cut off?"
        )
    if math.prod(shape) * BITS[dtype] != (stop - start) * 8:
        raise _damaged(file, f"{short(name)} has {stop - start:,} bytes for the shape {shape} of {dtype}")
    return Header(name=name, dtype=dtype, shape=tuple(shape), bytes=stop - start)


def _sizes(value: Any) -> bool:
    # Few and below 2^63 each: their product must stay cheap.
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping."""
    if file.stat().st_size > MAX_JSON:
        raise _damaged(file, f"it is larger than {MAX_JSON:,} bytes")
    value = _json(file.read_bytes(), file)
    if not isinstance(value, dict):
        raise _damaged(file, "it is not a mapping")
    return value


def _json(data: bytes, file: Path) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"it is not JSON: {short(str(error), 120)}") from None


def basename(name: Any, file: Path) -> str:
    """`name`, if it names a file in the same folder and nothing else."""
    safe = isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..")
    if not safe or any(c in name for c in "/\\\0:"):
        shown = short(str(name), 80)
        raise CheckpointError(
            f"{plain(str(file))} names the file {shown!r}; only plain names in the same folder are read"
        )
    return name


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{plain(str(file))}: {plain(reason)}")
