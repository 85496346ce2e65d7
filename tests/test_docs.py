"""What the docs say: their Python runs, their YAML is valid, their links lead somewhere, their tables are complete."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.toy_run import chats, folder
from treering.cli.parsing import read_text, validate
from treering.cli.schema import RunConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src" / "treering").rglob("README.md")],
)
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
NEEDED = {"model": "model: m", "data": "data: d.jsonl", "output": "output: o"}


def shown(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """(line, marked to run, text) of each block in `language`."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] == language:
            yield text.count("\n", 0, found.start("text")) + 1, found["mark"] == "runs", found["text"]


def runnable(page):
    return [(line, text) for line, runs, text in blocks(page, "python") if runs]


def run_page(root, page):
    """All marked blocks of a page, one after the other. The model they name is a folder here: nothing is replaced."""
    os.environ["HOME"] = str(root)  # the token cache
    os.chdir(root)
    folder(root / "Qwen" / "Qwen3-0.6B")
    chats(root / "chat.jsonl")
    names = {"__name__": "docs", "torch": torch, "tr": tr, "model": "Qwen/Qwen3-0.6B"}  # what short blocks begin with
    for line, text in runnable(page):
        exec(compile("\n" * (line - 1) + text, shown(page), "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=shown)
def test_python_on_a_page_runs(page, tmp_path):
    on_ranks(1, run_page, tmp_path, page)


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_python_that_does_not_run_says_why(page):
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["language"] == "python":
            mark = found["mark"] or ""
            assert mark == "runs" or re.fullmatch(r"not run: .{8,}", mark), f"{shown(page)}: {found['text'][:80]}"


def test_the_pages_that_should_run_do():
    names = {shown(page) for page in PAGES if runnable(page)}
    assert names >= {"README.md", "docs/own-loop.md", "docs/concepts.md", "docs/writing-a-technique.md"}


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "yaml"))], ids=shown)
def test_yaml_on_a_page_is_valid(page):
    for line, _, text in blocks(page, "yaml"):
        missing = [written for key, written in NEEDED.items() if not re.search(rf"^{key}:", text, re.MULTILINE)]
        validate(RunConfig, read_text("\n".join([text, *missing]), name=f"{shown(page)}, block in line {line}"))


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page):
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{shown(page)} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{shown(page)} links to {target}; there are {sorted(anchors(there))}"


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_settings_is_up_to_date():
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == make.page(), "run: python docs/make.py"
    concepts = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert all(mark in concepts for mark in make.MARKS)
    assert make.with_techniques(concepts) == concepts, "run: python docs/make.py"


def test_every_command_is_documented():
    from typer.main import get_command

    from treering.cli.app import app

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():
        assert f"## treering {name}\n" in page, name
        for inner in getattr(command, "commands", {}):
            assert f"$ treering {name} {inner}" in page, (name, inner)


def test_every_error_is_in_the_catalogue_with_its_exit_code():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for name in (n for n in tr.__all__ if n.endswith("Error")):
        assert f"| {getattr(tr, name).exit_code} | `{name}` |" in page, name


def test_no_tool_leaves_its_workplace_in_the_docs():
    for page in PAGES:
        assert not re.search(r"/work/|/tmp/|/root/", page.read_text(encoding="utf-8")), shown(page)
