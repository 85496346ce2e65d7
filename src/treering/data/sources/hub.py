"""Hugging Face datasets: a hub name, or a folder written by `save_to_disk`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.core.errors import DataError
from treering.data.sources.records import SampleError, bad

_MARKS = ("state.json", "dataset_dict.json")


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """An opened dataset and its Arrow files, whose bytes are the data."""

    dataset: Any
    files: tuple[Path, ...]
    split: str


def open_hub(name: str, split: str) -> HubSource:
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
    except Exception as error:  # the library raises a dozen unrelated kinds: network, missing split, bad files
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
    row = 0
    for value in source.dataset:
        row += 1
        yield row, value
    if row == 0:
        yield 1, bad(f"{label}:1", "empty file", f"the split {source.split!r} holds no row")
