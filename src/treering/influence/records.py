"""From sample ids to the records of the training data: which file, which row, and what is in it.

A sample id is `NAME:ROW` or `NAME:ROW#PIECE`. NAME is the file's name; if two files of the training data have one
name, it is the path as the user wrote it (`a/chat.jsonl`, `b/chat.jsonl`), so that they stay apart. ROW is the line or
row, from 1. A long text is cut into pieces, and all of them are one record.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from treering.core.errors import DataError
from treering.data.config import Data
from treering.data.examples import short_names
from treering.data.sources import reading
from treering.data.sources.columnar import rows_at_once
from treering.data.sources.jsonl import parse_line
from treering.data.sources.reading import Kind, SourceFile
from treering.data.sources.records import SampleError

_BOM = b"\xef\xbb\xbf"


class SamplePlace(NamedTuple):
    """The parts of a sample id. `piece` is 0 for a document that was not cut, and the first piece (`#0` or nothing)."""

    name: str
    row: int
    piece: int = 0

    @property
    def record(self) -> str:
        """The id of the record."""
        return f"{self.name}:{self.row}"


def place_of(sample_id: str) -> SamplePlace:
    """Return the parts of a sample id. The name may contain colons and number signs."""
    name, _, rest = sample_id.rpartition(":")
    row, mark, piece = rest.partition("#")
    if not name or not _is_number(row) or (mark and piece != "0" and not _is_number(piece)):
        raise DataError(f"{sample_id!r} is not the id of a document; ids are NAME:ROW or NAME:ROW#PIECE")
    return SamplePlace(name, int(row), int(piece or 0))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and text[0] != "0"


def record_of(sample_id: str) -> str:
    """Return the id of the record that a document is a piece of: `book.txt:1` for `book.txt:1#3`."""
    return place_of(sample_id).record


@dataclass(frozen=True, kw_only=True)
class IndexedSource:
    """A file or dataset of the training data, as it was when an index was made.

    Attributes:
        name: the beginning of its sample ids.
        label: its path as the user wrote it, or the name of a dataset.
        kind: how it is read.
        split: of a dataset.
        digest: of its bytes and label.
    """

    name: str
    label: str
    kind: Kind
    split: str
    digest: str

    def open(self) -> SourceFile:
        """Return the file or dataset. DataError if it is another one now, or has changed."""
        try:
            files = reading.open_sources((self.label,), self.split)
        except DataError as error:
            raise DataError(
                f"{error}; the index was made of it: put it back, or run the command in the folder of that time"
            ) from error
        if len(files) != 1 or files[0].kind != self.kind or reading.digest(files) != self.digest:
            raise DataError(
                f"{self.label} has changed since the index was made, so its rows may be other ones; "
                "put the old file back, or build the index again"
            )
        return files[0]


def indexed_sources(config: Data, which: Literal["train", "eval"] = "train") -> tuple[IndexedSource, ...]:
    """Return the sources of a set with the names that its sample ids have, and digests of their content."""
    split = config.eval_split if which == "eval" and config.eval is not None else config.split
    files = reading.open_sources(config.sources(which), split)
    names = short_names([file.label for file in files])
    return tuple(
        IndexedSource(name=name, label=file.label, kind=file.kind, split=split, digest=reading.digest((file,)))
        for name, file in zip(names, files, strict=True)
    )


def as_json(sources: Sequence[IndexedSource]) -> list[dict[str, str]]:
    """Return sources as values of JSON, for the description of an index or a table of scores."""
    return [asdict(source) for source in sources]


def from_json(values: object) -> tuple[IndexedSource, ...]:
    """Return the sources that `as_json` described."""
    fields = {"name", "label", "kind", "split", "digest"}
    if not isinstance(values, list) or not all(
        isinstance(value, dict) and value.keys() == fields and all(isinstance(entry, str) for entry in value.values())
        for value in values
    ):
        raise DataError("the description of the training data is not one that this version wrote; make it again")
    return tuple(IndexedSource(**value) for value in values)


def rows_by_source(sources: Sequence[IndexedSource], documents: Iterable[str]) -> dict[str, set[int]]:
    """Return the rows of documents by the name of their source. DataError if a document is of none of the sources."""
    rows: dict[str, set[int]] = {source.name: set() for source in sources}
    for document in documents:
        name, row, _ = place_of(document)
        if name not in rows:
            raise DataError(f"{document} is of none of the sources: they are {', '.join(map(repr, rows))}")
        rows[name].add(row)
    return rows


def read_records(sources: Sequence[IndexedSource], documents: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the records of documents by the id of the record. Files are read as far as they are needed.

    DataError if a source has changed since the index was made, or has no such row.
    """
    records: dict[str, dict[str, Any]] = {}
    for name, rows in rows_by_source(sources, documents).items():
        source = next(source for source in sources if source.name == name)
        if not rows:
            continue
        for row, value in _values(source.open(), rows):
            if isinstance(value, SampleError):
                raise value
            records[f"{name}:{row}"] = value
        missing = [row for row in sorted(rows) if f"{name}:{row}" not in records]
        if missing:
            raise DataError(f"{source.label} has no row {missing[0]}; the scores are of another file")
    return records


def _values(file: SourceFile, rows: set[int]) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    last = max(rows)
    if file.hub is not None:
        yield from ((row, file.hub.dataset[row - 1]) for row in sorted(rows) if row <= len(file.hub.dataset))
        return
    assert file.path is not None
    if file.kind == "jsonl":
        with file.path.open("rb") as stream:
            for row, line in enumerate(stream, 1):
                if row in rows:
                    yield row, parse_line(line.removeprefix(_BOM if row == 1 else b"").strip(), f"{file.label}:{row}")
                if row == last:
                    return
    elif file.kind == "parquet":
        before = 0
        table = arrow_and_parquet()[1].ParquetFile(file.path)
        for batch in table.iter_batches(rows_at_once(table.metadata)):
            inside = [row for row in sorted(rows) if before < row <= before + batch.num_rows]
            for row in inside:
                yield row, batch.slice(row - before - 1, 1).to_pylist()[0]
            before += batch.num_rows
            if before >= last:
                return
    elif 1 in rows:
        yield 1, {"text": file.path.read_bytes().decode("utf-8-sig")}


def arrow_and_parquet() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet, or raise DataError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "tables are Parquet or Arrow files, which need pyarrow; write: pip install 'treering[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


def text_of(record: Mapping[str, Any]) -> str:
    """Return the texts of a record, one field or message a line, for a person to read. Null fields are left out."""
    lines = []
    for name, value in record.items():
        if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
            for message in value:
                rest = {key: entry for key, entry in message.items() if key not in ("role", "content") and entry}
                parts = [_text(part) for part in (message.get("content"), rest) if part]
                lines.append(f"{message['role']}: {' '.join(parts)}")
        elif value is not None:
            lines.append(f"{name}: {_text(value)}")
    return "\n".join(lines)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
