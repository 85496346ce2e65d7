"""What every source yields: a record with its place, or the error that stands in its place."""

from typing import Any, NamedTuple

from treering.core.errors import DataError


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
