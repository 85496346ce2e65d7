"""Parquet files and Hugging Face datasets, row by row, with the row number in each error."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.core.errors import DataError
from treering.data.sources.records import SampleError, bad

_ROWS = 16  # of one batch: however long a row is, no more than these are in memory; 512 save 1 µs a row
_SQUEEZED = 64  # how many times as large a row group may be as in the file; one value may fill it, in each of its rows
_MARKS = ("state.json", "dataset_dict.json")


def read_parquet(path: Path, label: str) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    """Yield (row number from 1, row or error)."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{label}: reading parquet needs pyarrow; write: pip install 'treering[parquet]'") from None
    row = 0
    try:
        # Without pre_buffer, which reads a damaged file completely before the first error.
        file = parquet.ParquetFile(path, pre_buffer=False)
        for batch in file.iter_batches(rows_at_once(file.metadata)):
            for value in _rows(batch, label, row):
                row += 1
                yield row, value
    except (arrow.ArrowException, OSError) as error:
        yield row + 1, bad(f"{label}:{row + 1}", "parquet", f"not readable as parquet: {_first_line(error)}")
        return
    if row == 0:
        yield 1, bad(f"{label}:1", "empty file", "the file has no row")


def rows_at_once(metadata: Any) -> int:
    """Return how many rows of a parquet file are read at a time: one, where a few bytes may stand for many."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    squeezed = any(c.total_uncompressed_size > _SQUEEZED * max(1, c.total_compressed_size) for c in columns)
    return 1 if squeezed else _ROWS


def _rows(batch: Any, label: str, before: int) -> Iterator[dict[str, Any] | SampleError]:
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, TypeError, OverflowError):
        pass  # one value of the batch cannot be read: read row by row to find it
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


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return any((folder / mark).is_file() for mark in _MARKS)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """An opened dataset and its Arrow files."""

    dataset: Any
    files: tuple[Path, ...]
    split: str


def open_hub(name: str, split: str) -> HubSource:
    """Return a dataset of the hub, or of a folder written by `save_to_disk`."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name}: there is no such file or folder, and reading it as a dataset name needs `datasets`; "
            "write: pip install 'treering[hub]'"
        ) from None
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many unrelated kinds: network, missing split, bad files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: neither a file or folder here nor a dataset that could be opened (split {split!r}): {reason}"
        ) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{name}: there is no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return HubSource(dataset=loaded, files=tuple(Path(entry["filename"]) for entry in loaded.cache_files), split=split)


def read_hub(source: HubSource, label: str) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    """Yield (row number from 1, row), or an error if the dataset has no row."""
    row = 0
    for value in source.dataset:
        row += 1
        yield row, value
    if row == 0:
        yield 1, bad(f"{label}:1", "empty file", f"the split {source.split!r} has no row")
