"""Training data of every kind that is read, with the records that are in it."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet as parquet


def chats(names: list[str]) -> list[dict[str, Any]]:
    """One chat for each name."""
    return [
        {"messages": [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"{n} is {n}."}]}
        for n in names
    ]


def jsonl(path: Path, records: list[dict[str, Any]], newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(record) + newline for record in records).encode())
    return path


def all_kinds(folder: Path) -> tuple[str, ...]:
    """Two files of one name in two folders, a parquet file, a text and a saved dataset, all of the format text."""
    texts = lambda *names: [{"text": f"The text of {name}."} for name in names]  # noqa: E731
    jsonl(folder / "a" / "x.jsonl", texts("one", "two", "three"))
    jsonl(folder / "b" / "x.jsonl", texts("four", "five"))
    parquet.write_table(pyarrow.Table.from_pylist(texts("six", "seven")), folder / "c.parquet")
    (folder / "d.txt").write_text("The text of a file. " * 40)
    datasets.Dataset.from_list(texts("eight", "nine")).save_to_disk(str(folder / "saved"))
    return tuple(str(folder / name) for name in ("a/x.jsonl", "b/x.jsonl", "c.parquet", "d.txt", "saved"))
