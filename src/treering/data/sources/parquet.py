"""Parquet files, a batch of rows at a time, with row numbers in every error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treering.core.errors import DataError
from treering.data.sources.records import SampleError, bad

_ROWS = 512


def read_parquet(path: Path, label: str) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    """(row number from 1, row or error)."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{label}: reading parquet needs pyarrow; write: pip install 'treering[parquet]'") from None
    row = 0
    try:
        # pre_buffer off: a damaged file must not be read whole before the first error.
        for batch in parquet.ParquetFile(path, pre_buffer=False).iter_batches(_ROWS):
            for value in _rows(batch, label, row):
                row += 1
                yield row, value
    except (arrow.ArrowException, OSError) as error:
        yield row + 1, bad(f"{label}:{row + 1}", "parquet", f"not readable as parquet: {_first_line(error)}")
        return
    if row == 0:
        yield 1, bad(f"{label}:1", "empty file", "the file holds no row")


def _rows(batch: Any, label: str, before: int) -> Iterator[dict[str, Any] | SampleError]:
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, TypeError, OverflowError):
        pass  # one value of the batch cannot be read: find out which, row by row
    for i in range(batch.num_rows):
        try:
            (value,) = batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError as error:
            value = bad(f"{label}:{before + i + 1}", "utf-8", f"not UTF-8: {error.reason}")
        except (ValueError, TypeError, OverflowError) as error:
            value = bad(f"{label}:{before + i + 1}", "parquet", _first_line(error))
        yield value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
