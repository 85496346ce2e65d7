"""What every source yields, a record with its place or a named error, and the check of the strings in it."""

import re
from typing import Any, NamedTuple

from treering.core.errors import DataError

# Unicode keeps U+FDD0..U+FDEF out of interchange for good ("noncharacters"), so marks made of them cannot collide
# with honest text. Private-use characters can: icon fonts use them.
NAME_OPEN, NAME_CLOSE = "\ufdd4", "\ufdd5"  # the new name of a control token in the renamed tokenizer

_DEPTH = 64
_FORBIDDEN = re.compile("[\0\ud800-\udfff\ufdd0-\ufdef]")


class SampleError(DataError):
    """One sample is unusable. `kind` is the short name under which it is counted when it is skipped."""

    def __init__(self, message: str, *, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        # A keyword-only argument is lost by the default way exceptions travel between processes.
        return _rebuild, (str(self), self.kind)


def _rebuild(message: str, kind: str) -> SampleError:
    return SampleError(message, kind=kind)


class Record(NamedTuple):
    """`value` is the sample as the file states it, or why there is none. `columnar`: absent fields arrive as null."""

    file: int  # index into the list of files
    row: int  # 1-based line or row
    where: str  # "path:row", for messages
    value: dict[str, Any] | SampleError
    columnar: bool = False


def bad(where: str, kind: str, message: str, *, at: str = "") -> SampleError:
    """`at` is the field, as in `messages[2].role`."""
    return SampleError(f"{where}: {at + ': ' if at else ''}{message}", kind=kind)


def check_text(value: object, where: str, at: str) -> str:
    if not isinstance(value, str):
        raise bad(where, "schema", f"must be a string, not {type(value).__name__}", at=at)
    if value.isascii() and "\0" not in value:  # which is known at once
        return value
    found = _FORBIDDEN.search(value)
    if found is None:
        return value
    if found[0] == "\0":
        raise bad(where, "nul", f"NUL character at character {found.start() + 1}", at=at)
    code = ord(found[0])
    what = "half of a surrogate pair" if 0xD800 <= code <= 0xDFFF else "a Unicode noncharacter"
    raise bad(where, "utf-8", f"U+{code:04X} at character {found.start() + 1} is {what}", at=at)


def check_strings(value: Any, where: str, at: str, depth: int = 0) -> None:
    """Every string inside a JSON value, keys included. Templates walk these values recursively, hence the bound."""
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
