"""docs/errors.md has a row for every kind of refusal of a technique, and of measuring, that the code can make.

A kind is (error class, setting): the setting that a `ConfigError` names as `field` or a `PlanError` among its
`settings`, read from the syntax of the code. Words of messages are not compared.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import treering as tr

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "treering"
PAGE = ROOT / "docs" / "errors.md"
ERRORS = {name for name in tr.__all__ if name.endswith("Error")}
ANY = "*"  # a setting that is computed: one of several
NO_SETTING = "–"
SECTIONS = {
    folder.name: (folder,)
    for folder in sorted((SOURCE / "techniques").iterdir())
    if folder.is_dir() and any(folder.glob("*.py"))
}
SECTIONS["objectives"] = (SOURCE / "objectives", SOURCE / "plan" / "teacher.py")
SECTIONS["measure"] = (SOURCE / "curvature", SOURCE / "cli" / "measure.py")
SECTIONS["influence"] = (
    SOURCE / "influence",
    SOURCE / "sketches",
    *sorted((SOURCE / "cli").glob("influence*.py")),
)
TITLES = {"tiling": "tiledmlp, tiledblock, tiledloss"}

Kind = tuple[str, frozenset[str]]  # error class, its settings


def files(places: tuple[Path, ...]) -> Iterator[Path]:
    for place in places:
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def settings_of(call: ast.Call) -> frozenset[str]:
    for keyword in call.keywords:
        if keyword.arg in ("field", "settings"):
            given = keyword.value.elts if isinstance(keyword.value, ast.Tuple) else [keyword.value]
            names = (value.value if isinstance(value, ast.Constant) else ANY for value in given)
            return frozenset(str(name).removeprefix("techniques.") for name in names)
    return frozenset({NO_SETTING})


def refusals(text: str) -> Iterator[Kind]:
    """The errors that a file makes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            yield node.func.id, settings_of(node)


def rows(section: str) -> list[Kind]:
    """The rows of a section of the page."""
    title = TITLES.get(section, section)
    text = PAGE.read_text(encoding="utf-8").split(f"\n### {title}\n")
    assert len(text) == 2, f"docs/errors.md has no section {title}"
    cells = [line.split("|") for line in re.split(r"\n##+ ", text[1])[0].splitlines() if line.startswith("|")][2:]
    assert all(len(row) == 6 and all(cell.strip() for cell in row[1:5]) for row in cells), f"{title}: an unfinished row"
    return [(row[2].strip(" `"), frozenset(re.findall(r"`([^`]+)`", row[1]) or [NO_SETTING])) for row in cells]


def is_of(refusal: Kind, row: Kind) -> bool:
    """Whether `row` is about `refusal`: one class, and all its settings, written with or without their section."""
    named = {name.rpartition(".")[2] for name in refusal[1]}
    return refusal[0] == row[0] and (ANY in named or named <= {name.rpartition(".")[2] for name in row[1]})


def made(section: str) -> list[Kind]:
    return [kind for path in files(SECTIONS[section]) for kind in refusals(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("section", [name for name in SECTIONS if made(name)])
def test_every_refusal_has_a_row_and_every_row_a_refusal(section):
    kinds, told = made(section), rows(section)
    missing = {
        f"{name} of {', '.join(sorted(of))}" for name, of in kinds if not any(is_of((name, of), r) for r in told)
    }
    assert not missing, f"docs/errors.md, {section}: no row for {sorted(missing)}"
    settled = {
        f"{name} of {', '.join(sorted(of))}" for name, of in told if not any(is_of(k, (name, of)) for k in kinds)
    }
    assert not settled, f"docs/errors.md, {section}: nothing refuses {sorted(settled)}"


def test_a_refusal_without_a_row_would_be_seen():
    [kind] = refusals('raise PlanError(f"no {x}", settings=("techniques.lora.rank", "mesh"))')
    assert kind == ("PlanError", frozenset({"lora.rank", "mesh"}))
    assert is_of(kind, ("PlanError", frozenset({"rank", "mesh"}))) and not is_of(kind, ("ConfigError", kind[1]))
    assert not is_of(kind, ("PlanError", frozenset({"lora.rank"}))) and not is_of(kind, ("PlanError", {NO_SETTING}))
    assert [*refusals("raise ConfigError('x', field=name)")] == [("ConfigError", frozenset({ANY}))]
