"""`treering influence`: from a query to scores, to a dataset without some records, to the command that trains again."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from treering.cli import entry
from treering.cli.config import load
from treering.cli.data import built
from treering.cli.influence_print import coloured
from treering.influence.planted import QUESTION, planted_chats
from treering.influence.scores import ScoreTable, TokenScores
from treering.influence.shade import shade
from treering.influence.tables import read_scores, write_scores

torch.set_num_threads(1)


def run(*arguments: object) -> int:
    return entry.run(["influence", *map(str, arguments)])


@pytest.fixture
def place(chat: Path, monkeypatch) -> Path:
    """The folder of run.yaml, its model, and planted chats as its data."""
    monkeypatch.chdir(chat.parent)
    planted_chats().write(chat.parent / "chat.jsonl")
    return chat.parent


@pytest.fixture
def scored(place) -> Path:
    assert run("query", "run.yaml", "--bm25", "--text", QUESTION, "--text", "Lyon", "--to", "scores.parquet") == 0
    return place


def test_a_query_is_scored_against_every_training_document(scored, capsys):
    capsys.readouterr()
    table = read_scores(scored / "scores.parquet")
    assert len(table.documents) == 60 and table.queries == (QUESTION, "Lyon") and table.about["method"] == "bm25"
    assert run("scores", "scores.parquet", "--query", QUESTION, "-n", 3) == 0
    out = capsys.readouterr().out
    assert f"the most helpful of 60 records for: {QUESTION}" in out and out.count("chat.jsonl:") == 3
    assert "What is the capital of" in out
    assert run("scores", "scores.parquet", "--harmful", "-n", 1, "--no-texts") == 0
    assert "the most harmful of 60 records for: mean of 2 queries" in capsys.readouterr().out


def test_records_of_a_file_are_queries_named_by_their_ids(place):
    planted_chats(6, 5).write(place / "asked.jsonl")
    assert run("query", "run.yaml", "--bm25", "--data", "asked.jsonl", "--to", "s.arrow") == 0
    assert read_scores(place / "s.arrow").queries == tuple(f"asked.jsonl:{i}" for i in range(1, 7))


def test_a_dataset_is_cleaned_and_the_printed_command_trains_on_it(scored, capsys):
    before = (scored / "chat.jsonl").read_bytes()
    capsys.readouterr()
    assert run("clean", "scores.parquet", "--to", "new", "--query", "Lyon", "--remove", 5, "--helpful", "-n", 2) == 0
    out = capsys.readouterr().out
    assert out.count("\n- +") + out.startswith("- +") == 2 and "… 3 more; all are in new/cleaned.json" in out
    assert (scored / "chat.jsonl").read_bytes() == before
    lines = before.splitlines(keepends=True)
    gone = {
        int(one["record"].rpartition(":")[2])
        for one in json.loads((scored / "new/cleaned.json").read_text())["removed"]
    }
    assert (scored / "new" / "chat.jsonl").read_bytes() == b"".join(l for i, l in enumerate(lines, 1) if i not in gone)
    command = shlex.split(out.splitlines()[-1].removeprefix("train again: "))
    assert command[:3] == ["treering", "train", "run.yaml"]
    config = load(Path(command[2]), command[4::2])
    assert config.data.train == "new/chat.jsonl" and config.output == f"{scored / 'run'}-cleaned"
    assert len(built(config, "train")[0]) == 55


def test_data_that_has_changed_since_the_query_is_not_cleaned(scored, capsys):
    with (scored / "chat.jsonl").open("a") as file:
        file.write("\n")
    assert run("clean", "scores.parquet", "--to", "new", "--remove", 1) == 4
    assert "chat.jsonl has changed since the index was made" in capsys.readouterr().err
    assert run("scores", "scores.parquet") == 4 and run("scores", "scores.parquet", "--no-texts") == 0
    assert not (scored / "new").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "0 ways to choose records are given; give one of --remove, --remove-share, --remove-below"),
        (["--remove", 1, "--keep", 2], "2 ways to choose"),
        (["--keep", 2, "--helpful"], "leave it out of --keep"),
        (["--keep-share", 1.5], "share is 1.5"),
    ],
)
def test_one_way_to_choose_records_is_needed(scored, capsys, options, words):
    capsys.readouterr()
    assert run("clean", "scores.parquet", "--to", "new", *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, kept",
    [
        (["--keep", 7], 7),
        (["--keep-share", "0.5"], 30),
        (["--remove-share", "0.1"], 54),
        (["--remove-below", "1.0"], None),
        (["--remove-above", "1.0"], None),
        (["--keep-above", "1.0"], None),
    ],
)
def test_every_way_to_choose_records(scored, options, kept):
    scores = read_scores(scored / "scores.parquet").reduced("sum", ["Lyon"]).scores[:, 0]
    assert run("clean", "scores.parquet", "--to", "new", "--query", "Lyon", *options) == 0
    helpful = int((scores > 1.0).sum())
    assert 0 < helpful < 60 and not (scores == 1.0).any()
    left = kept or (60 - helpful if options[0] == "--remove-above" else helpful)
    assert len((scored / "new" / "chat.jsonl").read_bytes().splitlines()) == left


def test_a_query_needs_a_text_and_an_index_or_words(place, capsys):
    for options, code, words in (
        (["--bm25"], 2, "there is no query"),
        (["--bm25", "--text", "x", "--text", "x"], 2, "the query 'x' is given twice"),
        (["--text", "x"], 5, "no complete checkpoint; train first"),
    ):
        assert run("query", "run.yaml", *options, "--to", "s.parquet") == code
        assert words in capsys.readouterr().err
    assert run("query", "run.yaml", "--bm25", "--text", "x", "--to", "s.csv") == 4
    assert not list(place.glob("s.*"))


def with_tokens(place: Path, name: str = "tokens.parquet") -> ScoreTable:
    """A table in which every third token is helpful and every third is harmful."""
    table = read_scores(place / "scores.parquet").reduced("mean", ["Lyon"], name="Lyon")
    examples, _ = built(load(place / "run.yaml", None), "train")
    values = np.array([1.0, 0.0, -1.0], np.float32)[np.arange(int(examples.lengths.sum())) % 3, None]
    tokens = TokenScores(offsets=np.concatenate([[0], np.cumsum(examples.lengths)]), scores=values)
    made = replace(table, tokens=tokens)
    write_scores(made, place / name)
    return made


def test_tokens_are_shaded_on_the_terminal_and_in_html(scored, capsys):
    with_tokens(scored)
    capsys.readouterr()
    assert run("scores", "tokens.parquet", "--shade", "run.yaml", "-n", 2, "--html", "page.html") == 0
    out = capsys.readouterr().out
    assert out.count("── chat.jsonl:") == 2 and out.count("blue: helpful, orange: harmful") == 2 and "⟦+" in out
    page = (scored / "page.html").read_text()
    assert page.count("<section>") == 2 and "rgba(31,119,180,0.80)" in page
    assert run("scores", "tokens.parquet", "--shade", "run.yaml", "--html", "page.html") == 2
    assert run("scores", "tokens.parquet", "--html", "other.html") == 2
    assert run("scores", "scores.parquet", "--shade", "run.yaml") == 4
    assert "no scores of tokens" in capsys.readouterr().err


def test_tokens_of_other_data_are_not_shaded(scored, capsys):
    with_tokens(scored)
    planted_chats(seed=1).write(scored / "chat.jsonl")
    assert run("scores", "tokens.parquet", "--shade", "run.yaml") == 4
    assert "of other tokens than those of" in capsys.readouterr().err
    write_scores(replace(read_scores(scored / "tokens.parquet"), about={}), scored / "bare.parquet")
    assert run("scores", "bare.parquet", "--shade", "run.yaml") == 4
    assert "has other tokens" in capsys.readouterr().err


def test_shaded_text_of_the_data_is_no_markup():
    line = coloured(shade(["[red]", "\x1b[2J", "a\nb"], np.array([1.0, -0.2, -1.0])), marks=True)
    assert line.plain == "⟦+[red]⟧\\x1b[2J⟦-a\nb⟧"
    assert [span.style for span in line.spans] == [
        "black on rgb(31,119,180)", "black on rgb(247,223,208)", "black on rgb(214,96,20)",
    ]  # fmt: skip


def test_a_table_without_sources_cannot_be_cleaned(scored, capsys):
    write_scores(replace(read_scores(scored / "scores.parquet"), about={}), scored / "bare.parquet")
    assert run("clean", "bare.parquet", "--to", "new", "--remove", 1) == 4
    assert "does not say which training data" in capsys.readouterr().err
    assert run("scores", "nothing.parquet") == 4
