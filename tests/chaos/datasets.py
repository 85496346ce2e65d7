"""Data files that nobody meant: an error with file and line, or documents and skipped records that add up."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from treering.core.errors import DataError
from treering.data.config import Data
from treering.data.examples import build

TEXTS = [
    "",
    " ",
    "hi",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "é\u202e",
    "\ud800",
    "\0",
    "\x1b[2J",
    "\ufdd0",
    "{{ 1 }}",
    "a" * 3000,
]
ROLES = ["system", "user", "assistant", "tool", "bot", "", None, 3]
ANYTHING = [None, True, -1, 1.5, 10**400, "", "x", [], {}, [[]], {"a": None}]


def record(random: Random) -> Any:
    """One of the formats, most often right."""
    kind = random.choice(["messages"] * 6 + ["prompt", "alpaca", "text", "other"])
    text = lambda: random.choice(["hello", "two words", *TEXTS]) if random.random() < 0.3 else "hello"  # noqa: E731
    if kind == "messages":
        turns = [{"role": r, "content": text()} for _ in range(random.randrange(1, 4)) for r in ("user", "assistant")]
        for turn in turns:
            if random.random() < 0.08:
                turn[random.choice(["role", "content", "x", "tool_calls"])] = random.choice([*ROLES, *ANYTHING])
        if random.random() < 0.1:
            turns.insert(random.randrange(len(turns) + 1), {"role": random.choice(ROLES), "content": text()})
        return {"messages": turns}
    if kind == "prompt":
        return {"prompt": text(), "completion": text()}
    if kind == "alpaca":
        return {"instruction": text(), "input": text(), "output": text()}
    return {"text": text()} if kind == "text" else random.choice(ANYTHING)


def line(random: Random) -> bytes:
    """A record as JSON, sometimes with bytes that are none."""
    content = json.dumps(record(random), ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    harm: list[Callable[[bytes], bytes]] = [
        lambda b: b[: random.randrange(len(b) + 1)],
        lambda b: b + b,
        lambda b: b + b"\xff",
        lambda b: b.replace(b'"', b"'", 1),
        lambda b: b"\xef\xbb\xbf" + b,
        lambda b: b.replace(b"hello", b"\0", 1),
        lambda b: b.replace(b"{", b'{"messages": 1, ', 1),
        lambda b: b"[" * random.choice([3, 5000]),
        lambda b: random.randbytes(random.randrange(40)),
        lambda b: b.replace(b'"hello"', b"NaN", 1),
    ]
    return random.choice(harm)(content) if random.random() < 0.12 else content


def write(path: Path, random: Random) -> Path:
    if path.suffix == ".jsonl":
        lines = [line(random) for _ in range(random.choice([0, 1, 2, 5, 20]))]
        path.write_bytes(random.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines) + random.choice([b"", b"\n"]))
    elif path.suffix == ".txt":
        path.write_bytes(b"".join(line(random) for _ in range(random.randrange(4))))
    else:
        _parquet(path, random)
    return path


def _parquet(path: Path, random: Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = random.choice([["text"], ["prompt", "completion"], ["text", "x"], ["x"]])
    values = random.choice([["a", "b"], ["a", None], [1, 2], [None, None], [["a"], []], []])
    pq.write_table(pa.table(dict.fromkeys(columns, values)), path)
    if random.random() < 0.4:
        content = bytearray(path.read_bytes())
        content[random.randrange(len(content))] ^= 0xFF
        path.write_bytes(content[: random.choice([len(content), random.randrange(len(content))])])


def check(folder: Path, random: Random, tokenizer: Any) -> str:
    """`kept`, or `refused`; anything else is an AssertionError, or the exception that got out."""
    path = write(folder / f"data{random.choice(['.jsonl'] * 8 + ['.txt', '.parquet'])}", random)
    skip = random.random() < 0.5
    data = Data(train=str(path), cache=None, max_length=random.choice([16, 256]), skip_bad=skip, skip_untrained=skip)
    try:
        examples = build(data, tokenizer)
    except DataError as error:
        assert re.search(rf"{re.escape(path.name)}(:\d+)?: ", str(error)), f"no file and line: {error}"
        return "refused"
    finally:
        path.unlink()
    report = examples.report
    assert len(examples) == report.kept > 0
    assert sum(report.skipped.values()) + report.dropped <= report.read
    assert skip or not report.skipped, f"skipped unasked: {report.skipped}"
    for i in range(len(examples)):
        document = examples.document(i)
        assert re.fullmatch(rf"{re.escape(path.name)}:\d+(#\d+)?", document.sample_id), document.sample_id
        assert len(document.ids) == len(document.mask) <= data.max_length and document.mask.any()
    return "kept"
