"""The versions in pyproject.toml are those that the tests are run with: bounds are claims, and these are checked."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("hub", "parquet", "test")  # linters are not run with their oldest versions
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
REQUIRED += [Requirement(line) for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(kind):
    lines = (ROOT / f"constraints{kind}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("asked", REQUIRED, ids=str)
def test_a_lower_bound_is_the_version_that_was_run_and_nothing_is_bound_from_above(asked):
    [bound] = asked.specifier
    assert bound.operator == ">=", "an upper bound refuses versions that nobody has tried"
    assert Version(bound.version) == pins("-oldest")[normal(asked.name)], "change constraints-oldest.txt, and run it"


@pytest.mark.parametrize("kind", ["", "-newest"])
def test_the_other_versions_are_allowed_and_no_older(kind):
    for asked in REQUIRED:
        assert pins(kind)[normal(asked.name)] in asked.specifier, asked
        assert pins(kind)[normal(asked.name)] <= pins("-newest")[normal(asked.name)], asked


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_pages_name_the_oldest_and_newest_versions(package):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = f"| {package} | {pins('-oldest')[package]} | {pins('')[package]} | {pins('-newest')[package]} |"
    assert row in page, row
    assert f"{package} {pins('-oldest')[package]}" in (ROOT / "README.md").read_text(encoding="utf-8")
