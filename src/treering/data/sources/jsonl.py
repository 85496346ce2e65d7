"""A streaming reader of JSON lines: whatever the file contains, each line is a record or a named error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from treering.data.sources.records import SampleError, bad

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path, label: str, line_limit: int) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    """Yield (line number, object or error) for each line that is not blank. Memory is limited by `line_limit`."""
    any_record = False
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(line_limit + 1):
            number += 1
            where = f"{label}:{number}"
            if len(line) > line_limit and not line.endswith(b"\n"):
                _skip_line(stream)
                any_record = True
                yield (
                    number,
                    bad(where, "long line", f"the line is longer than {line_limit} bytes; raise data.line_limit"),
                )
                continue
            if number == 1 and line.startswith(_BOM):
                line = line[len(_BOM) :]
            line = line.strip(b" \t\r\n")
            if line:
                any_record = True
                yield number, parse_line(line, where)
    if not any_record:
        yield 1, bad(f"{label}:1", "empty file", "the file has no record")


def _skip_line(stream: BinaryIO) -> None:
    while part := stream.readline(_CHUNK):
        if part.endswith(b"\n"):
            return


def parse_line(line: bytes, where: str) -> dict[str, Any] | SampleError:
    """Return the JSON object of a line, or its error."""
    if b"\0" in line:
        return bad(where, "nul", f"NUL byte at byte {line.index(0) + 1} of the line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return bad(where, "utf-8", f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return bad(where, "json", f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return bad(where, "json", "the JSON is nested too deeply")
    except ValueError as error:
        return bad(where, "json", str(error))
    if not isinstance(value, dict):
        return bad(where, "schema", f"the line contains {_name(value)}; write one JSON object a line")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} is given twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
