"""Records with their places, errors of single samples, and the check of strings in records."""

import re
from typing import Any, NamedTuple

from treering.core.errors import DataError

# Unicode reserves U+FDD0..U+FDEF ("noncharacters") and no text may use them, so names made of them do not occur in
# data. Private-use characters do: icon fonts use them.
NAME_OPEN, NAME_CLOSE = "\ufdd4", "\ufdd5"  # around the name of a control token in the renamed tokenizer

_DEPTH = 64
_FORBIDDEN = re.compile("[\0\ud800-\udfff\ufdd0-\ufdef]")


class SampleError(DataError):
    """One sample is unusable. `kind` is the short name under which it is counted when it is skipped."""

    def __init__(self, message: str, *, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling an exception between processes loses keyword-only arguments by default.
        return _rebuild, (str(self), self.kind)


def _rebuild(message: str, kind: str) -> SampleError:
    return SampleError(message, kind=kind)


class Record(NamedTuple):
    """A sample as it is in the file, or the error in its place. `columnar`: absent fields are null."""

    file: int  # index into the list of files
    row: int  # 1-based line or row
    where: str  # "path:row", for messages
    value: dict[str, Any] | SampleError
    columnar: bool = False


def bad(where: str, kind: str, message: str, *, at: str = "") -> SampleError:
    """Return an error of the sample at `where`. `at` is the field, such as `messages[2].role`."""
    return SampleError(f"{where}: {at + ': ' if at else ''}{message}", kind=kind)


def check_text(value: object, where: str, at: str) -> str:
    """Return the string, or raise SampleError if it is not a string or cannot be encoded without loss."""
    if not isinstance(value, str):
        raise bad(where, "schema", f"must be a string, not {type(value).__name__}", at=at)
    if value.isascii() and "\0" not in value:  # the fast test
        return value
    forbidden = _FORBIDDEN.search(value)
    if forbidden is None:
        return value
    if forbidden[0] == "\0":
        raise bad(where, "nul", f"NUL character at character {forbidden.start() + 1}", at=at)
    code = ord(forbidden[0])
    kind = "half of a surrogate pair" if 0xD800 <= code <= 0xDFFF else "a Unicode noncharacter"
    raise bad(where, "utf-8", f"U+{code:04X} at character {forbidden.start() + 1} is {kind}", at=at)


def check_strings(value: Any, where: str, at: str, depth: int = 0) -> None:
    """Check each string in a JSON value, keys included. Templates read values recursively, so the depth is limited."""
    if depth > _DEPTH:
        raise bad(where, "json", f"is nested more than {_DEPTH} levels deep", at=at[:80])
    if isinstance(value, str):
        check_text(value, where, at)
    elif isinstance(value, dict):
        for key, entry in value.items():
            check_text(key, where, at)
            check_strings(entry, where, f"{at}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            check_strings(entry, where, f"{at}[{i}]", depth + 1)
