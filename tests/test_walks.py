"""docs/dev/walks.md names files and functions that exist, at most four files to a walk."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "dev" / "walks.md"
WALKS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
STEP = re.compile(r"^\* \[(?P<shown>[^]]+)\]\((?P<link>[^)]+)\): (?P<rest>.+(?:\n  .+)*)", re.MULTILINE)


@cache
def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
    return names


def test_they_are_numbered():
    assert [walk.split(".")[0] for walk in WALKS] == [str(i + 1) for i in range(len(WALKS))]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.split("\n")[0][:60])
def test_a_walk_names_what_is_there(walk):
    steps = list(STEP.finditer(walk))
    assert 2 <= len(steps) == walk.count("\n* ") <= 4
    for step in steps:
        path = (PAGE.parent / step["link"]).resolve()
        assert path.is_file() and path.as_posix().endswith(f"src/treering/{step['shown']}"), step["shown"]
        names = re.findall(r"`([A-Za-z_.]+)`", step["rest"])
        assert names, f"{step['shown']} names no function"
        missing = [name for name in names if name not in defined(path)]
        assert not missing, f"{step['shown']} has no {missing}"
