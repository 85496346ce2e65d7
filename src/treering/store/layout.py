"""The layout of a safetensors file: the names of its dtypes, and its header. Needs no torch."""

import json
from collections.abc import Iterable, Mapping

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
# torch's names for dtypes -> safetensors' names
DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def header_of(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str] | None = None,
    separators: tuple[str, str] = (",", ":"),
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header of a safetensors file, its length included, and the bytes of the file that each tensor takes.

    `tensors` are (name, the format's name of the dtype, shape, bytes), in the order of their data. `separators` are
    those of the header's JSON.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    spans, at = {}, 0
    for name, dtype, shape, length in tensors:
        spans[name] = at, at + length
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(entries, separators=separators).encode()
    text += b" " * (-len(text) % 8)  # so that all tensors are aligned if the widest come first
    before = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: (a + before, b + before) for n, (a, b) in spans.items()}
