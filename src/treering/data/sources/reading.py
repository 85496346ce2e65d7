"""The files of a source string, their records in a fixed order, and the digest of their bytes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from treering.core.errors import DataError
from treering.data.config import Data
from treering.data.sources.columnar import HubSource, is_saved_dataset, open_hub, read_hub, read_parquet
from treering.data.sources.jsonl import read_jsonl
from treering.data.sources.records import Record, SampleError, bad

Kind = Literal["jsonl", "parquet", "txt", "hub"]
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "txt"}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file, or one dataset. `label` is the path as the user wrote it."""

    label: str
    kind: Kind
    path: Path | None = None
    hub: HubSource | None = None


def open_sources(sources: tuple[str, ...], split: str) -> tuple[SourceFile, ...]:
    """Return the files and datasets of source strings, in order."""
    files = tuple(file for source in sources for file in _open(source, split))
    labels = [file.label for file in files]
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise DataError(f"{repeated}: is given twice as a source; name it once")
    return files


def _open(source: str, split: str) -> list[SourceFile]:
    path = Path(source).expanduser()
    if path.is_dir():
        if is_saved_dataset(path):
            return [SourceFile(label=source, kind="hub", hub=open_hub(str(path), split))]
        paths = sorted(p for p in path.iterdir() if p.suffix in _KINDS and p.is_file())
        if not paths:
            raise DataError(f"{source}: the folder has no .jsonl, .parquet or .txt file")
        return [SourceFile(label=str(p), kind=_KINDS[p.suffix], path=p) for p in paths]
    if path.is_file():
        if path.suffix not in _KINDS:
            raise DataError(f"{source}: files of the kind {path.suffix!r} are not read; write .jsonl, .parquet or .txt")
        return [SourceFile(label=source, kind=_KINDS[path.suffix], path=path)]
    if path.exists() or path.suffix in _KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: there is no such file or folder")
    return [SourceFile(label=source, kind="hub", hub=open_hub(source, split))]


def read(files: tuple[SourceFile, ...], config: Data, which: Literal["train", "eval"]) -> Iterator[Record]:
    """Yield all records of a set, file by file. The content of a record decides whether it is held out."""
    for index, file in enumerate(files):
        columnar = file.kind in ("parquet", "hub")
        try:
            for row, value in _values(file, config):
                if config.eval_fraction > 0 and _held_out(value, config.eval_fraction) != (which == "eval"):
                    continue
                yield Record(file=index, row=row, where=f"{file.label}:{row}", value=value, columnar=columnar)
        except OSError as error:
            raise DataError(f"{file.label}: cannot be read: {error.strerror or error}") from error


def _values(file: SourceFile, config: Data) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    if file.hub is not None:
        return read_hub(file.hub, file.label)
    assert file.path is not None
    if file.kind == "jsonl":
        return read_jsonl(file.path, file.label, config.line_limit)
    if file.kind == "parquet":
        return read_parquet(file.path, file.label)
    return iter([(1, _read_text(file.path, file.label))])


def _read_text(path: Path, label: str) -> dict[str, Any] | SampleError:
    """Return the text of a file as one record: a blank line does not end a document."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return bad(f"{label}:1", "utf-8", f"not UTF-8: {error.reason} at byte {error.start + 1} of the file")
    if not text.strip():
        return bad(f"{label}:1", "empty file", "the file has no text")
    return {"text": text}


def _held_out(value: dict[str, Any] | SampleError, fraction: float) -> bool:
    if isinstance(value, SampleError):
        return False  # a bad record is reported or counted once, with the training data
    text = json.dumps(value, sort_keys=True, default=repr).encode()
    return xxhash.xxh3_64_intdigest(text) < fraction * 2**64


def digest(files: tuple[SourceFile, ...]) -> str:
    """Return a digest of the bytes and names of all files; names are included because sample ids are cached."""
    state = xxhash.xxh3_128()
    for file in files:
        state.update(f"{file.label}\0{file.kind}\0".encode())
        paths = [file.path] if file.path is not None else []
        if file.hub is not None:
            state.update(f"{file.hub.split}\0{len(file.hub.dataset)}\0".encode())
            paths = list(file.hub.files)
            if not paths:  # a dataset in memory has no files: its values are digested
                for value in file.hub.dataset:
                    state.update(json.dumps(value, sort_keys=True, default=repr).encode())
        for path in paths:
            _update(state, path, file.label)
    return state.hexdigest()


def _update(state: "xxhash.xxh3_128", path: Path, label: str) -> None:
    try:
        with path.open("rb") as stream:
            while part := stream.read(1 << 22):
                state.update(part)
            state.update(stream.tell().to_bytes(8, "little"))
    except OSError as error:
        raise DataError(f"{label}: cannot be read: {error.strerror or error}") from error
