"""The header of a safetensors file, checked before the library maps the file.

The library refuses holes, overlaps and sizes that do not fit their shapes. It takes the later of two tensors with one
name, and parses a header of 100 MB whatever is in it; here both are refused too, and every refusal names the file.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError
from treering.store.layout import BITS
from treering.store.untrusted.files import parse_json

MAX_HEADER = 100_000_000  # the limit of the format's own reader


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
