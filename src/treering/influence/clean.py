"""A copy of the training data without some records: file by file, in order, kept lines byte by byte.

    to/x.jsonl       each line of x.jsonl that is kept, with its bytes
    to/c.parquet     the rows of c.parquet that are kept, with its schema
    to/saved/        a dataset of `datasets` with the rows that are kept
    to/cleaned.json  what was removed, with scores and texts, and how to train again

A source of which nothing is left is left out. The folder is published by a rename; no input is written to.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treering.core.errors import DataError
from treering.data.examine import printable
from treering.data.sources.jsonl import parse_line
from treering.data.sources.reading import SourceFile
from treering.influence.choose import RecordChoice, choose
from treering.influence.records import IndexedSource, arrow_and_parquet, rows_by_source, text_of
from treering.influence.scores import ScoreTable
from treering.store import disk
from treering.store.publish import published

LISTING = "cleaned.json"  # an ending that a folder of training data is not searched for
_PART = 1 << 20  # bytes of a line that are read at once
_ROWS = 1 << 16  # of a parquet file
_TEXT = 200  # characters of a removed record in the listing
_PLAIN = re.compile(r"[A-Za-z./~][\w./~+-]*", re.ASCII)  # what the command line reads as text without quotes


@dataclass(frozen=True, kw_only=True)
class RemovedRecord:
    """A record that the new dataset does not have. `text` is the beginning of its text, as it is in the data."""

    record: str
    score: float
    text: str


@dataclass(frozen=True, kw_only=True)
class CleanedSource:
    """What a source has become. `path` is None if nothing of it is left; `unscored` of its rows had no score."""

    source: str
    path: str | None
    kept: int
    removed: int
    unscored: int


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """A dataset without some records, as it was written.

    Attributes:
        folder: where it is.
        sources: what became of each source, in their order.
        removed: the removed records with a score, the first chosen one first.
        ties: records that are kept, with exactly the score of a removed one.
    """

    folder: Path
    sources: tuple[CleanedSource, ...]
    removed: tuple[RemovedRecord, ...]
    ties: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The new sources, for `data.train`."""
        return tuple(source.path for source in self.sources if source.path is not None)

    def listing(self) -> list[str]:
        """Return a line for each removed record, like a diff: score, id and text, with control characters escaped."""
        return [
            f"- {one.score:+.4g}  {printable(one.record)}  {printable(one.text.replace(chr(10), ' ⏎ '))}"
            for one in self.removed
        ]

    def retrain(self, config: str, output: str) -> str:
        """Return the command that trains again: `config` with the new data, into another output folder."""
        return retrain_command(config, self.paths, output)


def retrain_command(config: str, paths: Sequence[str], output: str) -> str:
    """Return the `treering train` command of a configuration file with other training data and another output."""
    quoted = [path if _PLAIN.fullmatch(path) else json.dumps(path, ensure_ascii=False) for path in paths]
    train = quoted[0] if len(paths) == 1 else "[" + ", ".join(json.dumps(p, ensure_ascii=False) for p in paths) + "]"
    where = output if _PLAIN.fullmatch(output) else json.dumps(output, ensure_ascii=False)
    return shlex.join(["treering", "train", config, "--set", f"data.train={train}", "--set", f"output={where}"])


def clean(table: ScoreTable, sources: Sequence[IndexedSource], choice: RecordChoice, to: Path) -> Cleaned:
    """Write a copy of the training data without the records of `choice`.

    Args:
        table: scores with one query, of documents or of records.
        sources: the training data as it was when it was indexed; what has changed since is refused.
        choice: which records.
        to: a new folder.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise DataError(f"{to} exists already, and nothing is overwritten; give another folder")
    records = table.by_record()
    chosen = choose(records, choice)
    scores = {records.documents[row]: float(records.scores[row, 0]) for row in chosen.rows.tolist()}
    scored, removed = (rows_by_source(sources, names) for names in (records.documents, scores))
    files = [source.open() for source in sources]
    need = sum(file.path.stat().st_size for file in files if file.path is not None)
    texts: dict[str, str] = {}
    results = []
    try:
        with published(to, need) as (temporary, _):
            for source, file, name in zip(sources, files, _file_names(sources), strict=True):
                rows = _KeptRows(scored[source.name], removed[source.name], choice.unscored == "drop")
                results.append(_copy(file, temporary / name, str(to / name), rows))
                texts.update({f"{source.name}:{row}": text for row, text in rows.texts.items()})
            if not any(result.kept for result in results):
                raise DataError(f"to {choice.text} would leave no record; give another number, or keep the unscored")
            listed = tuple(RemovedRecord(record=r, score=score, text=texts[r]) for r, score in scores.items())
            cleaned = Cleaned(folder=to, sources=tuple(results), removed=listed, ties=chosen.ties)
            _describe(cleaned, table, choice, temporary / LISTING)
            for written in temporary.rglob("*"):
                disk.sync(written)
    except OSError as error:
        raise DataError(f"{to} cannot be written: {error.strerror or error}; give another folder") from error
    return cleaned


def _copy(file: SourceFile, path: Path, final: str, rows: "_KeptRows") -> CleanedSource:
    """Write the rows of a source that are kept to `path`."""
    before = _state(file)
    _WRITERS[file.kind](file, path, rows)
    if before != _state(file):
        raise DataError(f"{file.label} was written to while it was read; run the command again")
    if missing := rows.scored - rows.seen:
        raise DataError(f"{file.label} has no row {min(missing)}; the scores are of another file")
    if not rows.kept:
        _remove(path)
    return CleanedSource(
        source=file.label,
        path=final if rows.kept else None,
        kept=rows.kept,
        removed=rows.removed_rows,
        unscored=rows.unscored,
    )


class _KeptRows:
    """What happens to each row of a source, and what has happened so far."""

    def __init__(self, scored: set[int], removed: set[int], drop_unscored: bool):
        self.scored, self.removed, self._drop = scored, removed, drop_unscored
        self.seen: set[int] = set()
        self.texts: dict[int, str] = {}
        self.kept = self.unscored = self.removed_rows = 0

    def keeps(self, row: int) -> bool:
        """Count a row that has a record, and return whether it is kept."""
        if row in self.scored:
            self.seen.add(row)
        else:
            self.unscored += 1
        keep = row not in self.removed and (row in self.scored or not self._drop)
        self.kept += keep
        self.removed_rows += not keep
        return keep

    def note(self, row: int, record: Any) -> None:
        """Keep the text of a removed record for the listing."""
        if row in self.removed:
            self.texts[row] = text_of(record)[:_TEXT] if isinstance(record, dict) else ""


def _write_jsonl(file: SourceFile, path: Path, rows: _KeptRows) -> None:
    """Copy the lines that are kept. A line is read in parts, so that its length does not matter."""
    assert file.path is not None
    row, begins, keep, line = 0, True, True, b""
    with file.path.open("rb") as stream, path.open("xb") as out:
        while part := stream.readline(_PART):
            if begins:
                row, line = row + 1, b""
                blank = len(part) < _PART and not part.strip(b" \t\r\n\xef\xbb\xbf")
                keep = blank or rows.keeps(row)
            if keep:
                out.write(part)
            elif row in rows.removed:
                line += part
            begins = part.endswith(b"\n")
            if begins and line:
                rows.note(row, parse_line(line.removeprefix(b"\xef\xbb\xbf").strip(), f"{file.label}:{row}"))
        if line and not begins:
            rows.note(row, parse_line(line.removeprefix(b"\xef\xbb\xbf").strip(), f"{file.label}:{row}"))


def _write_text(file: SourceFile, path: Path, rows: _KeptRows) -> None:
    assert file.path is not None
    if rows.keeps(1):
        shutil.copyfile(file.path, path)
    else:
        with file.path.open(encoding="utf-8-sig", errors="replace") as stream:
            rows.note(1, {"text": stream.read(_TEXT)})


def _write_parquet(file: SourceFile, path: Path, rows: _KeptRows) -> None:
    arrow, parquet = arrow_and_parquet()
    source = parquet.ParquetFile(file.path)
    before = 0
    with parquet.ParquetWriter(path, source.schema_arrow) as writer:
        for batch in source.iter_batches(_ROWS):
            keep = [rows.keeps(before + i) for i in range(1, batch.num_rows + 1)]
            for i in [i for i, kept in enumerate(keep) if not kept]:
                rows.note(before + i + 1, batch.slice(i, 1).to_pylist()[0])
            if any(keep):
                writer.write_batch(batch.filter(arrow.array(keep)))
            before += batch.num_rows


def _write_dataset(file: SourceFile, path: Path, rows: _KeptRows) -> None:
    assert file.hub is not None
    dataset = file.hub.dataset
    kept = [row for row in range(1, len(dataset) + 1) if rows.keeps(row)]
    for row in sorted(rows.removed & rows.seen):
        rows.note(row, dataset[row - 1])
    dataset.select([row - 1 for row in kept]).save_to_disk(str(path))


_WRITERS: dict[str, Callable[[SourceFile, Path, _KeptRows], None]] = {
    "jsonl": _write_jsonl,
    "txt": _write_text,
    "parquet": _write_parquet,
    "hub": _write_dataset,
}


def _file_names(sources: Sequence[IndexedSource]) -> list[str]:
    """Return a name in the new folder for each source: that of its file, with a number if another has the same."""
    names = [Path(source.label).name for source in sources]
    names = ["data" if name in ("", "..", LISTING) else name for name in names]
    return names if len(set(names)) == len(names) else [f"{i:03}-{name}" for i, name in enumerate(names)]


def _state(file: SourceFile) -> list[tuple[int, int]]:
    paths = [file.path] if file.path is not None else list(file.hub.files if file.hub is not None else ())
    return [(state.st_size, state.st_mtime_ns) for state in map(os.stat, paths)]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _describe(cleaned: Cleaned, table: ScoreTable, choice: RecordChoice, path: Path) -> None:
    about = {
        "format": 1,
        "query": table.queries[0],
        "choice": {name: value for name, value in asdict(choice).items() if value is not None},
        "sources": [asdict(source) for source in cleaned.sources],
        "removed": [asdict(record) for record in cleaned.removed],
        "ties": cleaned.ties,
    }
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
