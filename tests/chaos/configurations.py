"""Configurations that nobody meant: a valid run or exit code 2, with a message and without a traceback."""

import contextlib
import io
import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from treering.cli import entry
from treering.cli.parsing.sections import paths
from treering.cli.schema import RunConfig

VALID = """\
model: {path: Qwen/Qwen3-0.6B, dtype: float32, dropout: "off"}
data:
  train: [a.jsonl, "b.parquet"]
  eval_fraction: 0.1
  columns: {messages: conversations}
techniques:
  lora: &one {rank: 8, targets: [q_proj], init: pissa}
  shard:
mesh: {replicate: 1}
train:
  steps: 10
  optimizer: {name: adamw, lr: 1.0e-4, betas: [0.9, 0.99]}
  checkpoint: {every: 5, keep: 2}
  evaluate: {every: 2, prompts: ["hello \\u00e9"]}
output: runs/x
seed: 3
"""
STRANGE = [
    "\t", "\0", "\ufeff", "\x1b[2J", "\u202e", "&a ", "*a", "*one", "<<: *one", "!!python/object/apply:os.system [id]",
    "!!set", "? ", "- ", "---\n", "...\n", "%YAML 1.1\n", "{", "}", "[", "]", ": ", "#", "|\n", ">\n", "'", '"', "~",
    "null", ".nan", "-.inf", "1e999", "0x10", "0o7", "1_000", "12:30:45", "2001-01-01", "yes", "=", "9" * 5000,
    "[" * 200, "{a: " * 200, "&a [*a, *a]", "x" * 70000, "\r", "\u2028", "\U0001f332",
]  # fmt: skip
KEYS = sorted({str(key) for path in paths(RunConfig) for key in path} | {"", "x", "steps ", "__class__", "0", "a.b"})

PLACES = sorted({tuple(str(key) for key in path if key != 0) for path in paths(RunConfig)})

likely = st.integers(0, 9) | st.floats(0, 1) | st.booleans() | st.sampled_from([None, "auto", "a", [], ["a"], {}])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "adamw", "off", "hf_aaaaaaaaaaaaaaaaaaaa", -1, 0, 2**63, 2**4000, 1e308, float("nan")])
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)


@st.composite
def places(draw: st.DrawFn) -> bytes:
    """The valid configuration with other values at places where settings are."""
    values = yaml.safe_load(VALID)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES))
        at: Any = values
        for key in path[:-1]:
            if not isinstance(at.get(key), dict):
                at[key] = {}
            at = at[key]
        at[path[-1]] = draw(likely | scalars | trees)
    return json.dumps(values).encode("utf-8", "surrogatepass")


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """The text of the valid one, cut, doubled, and with strange things in between."""
    lines = VALID.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(lines) - 1))
        column = draw(st.integers(0, len(lines[at])))
        strange = draw(st.sampled_from(STRANGE) | st.text(max_size=4))
        change: Callable[[str], str] = draw(
            st.sampled_from(
                [
                    lambda line, c=column, s=strange: line[:c] + s + line[c:],
                    lambda line, c=column, s=strange: line[:c] + s + line[c + 1 :],
                    lambda line, c=column: line[:c],
                    lambda line: "  " + line,
                    lambda line: line + line,
                    lambda line: line.replace(":", "", 1),
                ]
            )
        )
        lines[at] = change(lines[at])
    return "".join(lines).encode("utf-8", "surrogatepass")


files = (
    places() | texts() | trees.map(lambda v: json.dumps(v).encode("utf-8", "surrogatepass")) | st.binary(max_size=64)
)
overrides = st.just([]) | st.lists(
    st.tuples(st.sampled_from([".".join(path) for path in PLACES]), st.sampled_from(STRANGE[3:-5])),
    max_size=1,
)


def fuzz(folder: Path, cases: int, seed: int) -> dict[str, int]:
    """How many were valid and how many refused; anything else is an AssertionError with the smallest example."""
    counts = {"valid": 0, "refused": 0}

    @seeded(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(files, st.sampled_from([".yaml", ".yaml", ".yaml", ".json"]), overrides)
    def one(content: bytes, kind: str, said: list[tuple[str, str]]) -> None:
        file = folder / f"run{kind}"
        file.write_bytes(content)
        given = [word for key, value in said for word in ("--set", f"{key}={value}")]
        counts[check(file, given)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hypothesis finds our strange texts too long to show
        one()
    assert check_text(folder, VALID) == "valid", "what all are made from is not valid itself"
    return counts


def check_text(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return check(folder / "run.yaml", [])


def check(file: Path, arguments: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = entry.run(["config", "check", str(file), *arguments])
    told = out.getvalue() + err.getvalue()
    assert code in (0, 2), f"exit code {code}: {told[-2000:]}"
    assert "Traceback" not in told, told[-2000:]
    controls = [c for c in err.getvalue() if c != "\n" and _paints(c)]
    assert not controls, f"it would paint the terminal with {controls[:3]}"
    assert code == 0 or err.getvalue().strip(), "refused without a word"
    return "refused" if code else "valid"


def _paints(character: str) -> bool:
    """Moves the cursor, opens an escape sequence, breaks the line, or turns the direction of what follows."""
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
