"""Tables of scores as files: Parquet (.parquet) or Arrow (.arrow), which other programs read as well.

The first column is `document`. Then there is a column of float32 for each query: `score:QUERY`; then those of modules
and of other methods, `module:NAME:QUERY` and `baseline:NAME:QUERY`; then lists with the scores of the tokens of each
document, `tokens:QUERY`. What the columns are is said once more in the metadata of the schema, under `treering`, as
JSON with `format` 1.
"""

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import DataError
from treering.influence.records import arrow_and_parquet
from treering.influence.scores import ScoreTable, TokenScores
from treering.store import disk

FORMAT = 1
_KEY = b"treering"
_SUFFIXES = (".parquet", ".arrow")


def write_scores(table: ScoreTable, path: Path) -> None:
    """Write a table of scores as a new file, published by a rename. DataError if there is a file already."""
    refuse_taken_file(path)
    arrow, parquet = arrow_and_parquet()
    columns: dict[str, Any] = {"document": arrow.array(table.documents, arrow.large_string())}
    for name, values in table.parts().items():
        for q, query in enumerate(table.queries):
            columns[f"{name}:{query}"] = arrow.array(np.ascontiguousarray(values[:, q]))
    if table.tokens is not None:
        for q, query in enumerate(table.queries):
            flat = arrow.array(np.ascontiguousarray(table.tokens.scores[:, q]))
            columns[f"tokens:{query}"] = arrow.LargeListArray.from_arrays(arrow.array(table.tokens.offsets), flat)
    if len(columns) != 1 + len(table.queries) * (len(table.parts()) + (table.tokens is not None)):
        raise DataError("two columns of the table would have one name; leave colons out of the names of queries")
    meaning = {
        "format": FORMAT,
        "queries": list(table.queries),
        "modules": list(table.modules),
        "baselines": list(table.baselines),
        "tokens": table.tokens is not None,
        "about": dict(table.about),
    }
    made = arrow.table(columns).replace_schema_metadata({_KEY: json.dumps(meaning, sort_keys=True).encode()})
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(made, temporary, compression="zstd")
        else:
            with arrow.OSFile(str(temporary), "wb") as file, arrow.ipc.new_file(file, made.schema) as writer:
                writer.write_table(made)
        disk.sync(temporary)
        os.rename(temporary, path)
        disk.sync(path.parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; give another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def refuse_taken_file(path: Path) -> None:
    """Raise DataError if a table of scores cannot be written to `path`: another ending, or there is something."""
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: a table of scores is a .parquet or .arrow file; give it one of these endings")
    if path.exists():
        raise DataError(f"{path} exists already, and nothing is overwritten; give another name")


def read_scores(path: Path) -> ScoreTable:
    """Return the table of scores of a file that `write_scores` wrote."""
    if path.suffix not in _SUFFIXES or not path.is_file():
        raise DataError(f"{path}: there is no such .parquet or .arrow file; `treering influence query` writes one")
    arrow, parquet = arrow_and_parquet()
    try:
        if path.suffix == ".parquet":
            read = parquet.read_table(path)
        else:
            with arrow.memory_map(str(path)) as file, arrow.ipc.open_file(file) as reader:
                read = reader.read_all()
        meaning = json.loads((read.schema.metadata or {})[_KEY])
        if meaning["format"] != FORMAT:
            raise DataError(
                f"{path} is of format {meaning['format']}, and this version reads {FORMAT}; update treering"
            )
        return _table(read, meaning, arrow)
    except (arrow.ArrowException, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is no table of scores, or a damaged one ({reason}); make it again") from error


def _table(read: Any, meaning: dict[str, Any], arrow: Any) -> ScoreTable:
    columns = iter(read.itercolumns())
    documents = tuple(next(columns).to_pylist())
    queries = tuple(meaning["queries"])

    def part() -> NDArray[np.float32]:
        return np.column_stack([next(columns).to_numpy() for _ in queries])

    scores = part()
    modules = {name: part() for name in meaning["modules"]}
    baselines = {name: part() for name in meaning["baselines"]}
    tokens = _tokens([next(columns).combine_chunks() for _ in queries]) if meaning["tokens"] else None
    if not all(isinstance(name, str) for name in (*documents, *queries)):
        raise ValueError("an id or name that is no text")
    return ScoreTable(
        documents=documents,
        queries=queries,
        scores=scores,
        modules=modules,
        baselines=baselines,
        tokens=tokens,
        about=meaning["about"],
    )


def _tokens(lists: list[Any]) -> TokenScores:
    lengths = [np.asarray(one.value_lengths()) for one in lists]
    if any(not np.array_equal(lengths[0], other) for other in lengths):
        raise ValueError("documents with another number of tokens for another query")
    flat = [np.asarray(one.flatten()) for one in lists]
    return TokenScores(offsets=np.cumsum([0, *lengths[0]], dtype=np.int64), scores=np.column_stack(flat))
