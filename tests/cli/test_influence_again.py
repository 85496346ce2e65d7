"""By commands alone: train, index the run, ask it, clean the data, train again."""

import shlex

import numpy as np
import pytest
import torch

from tests.toy_run import chats, folder
from treering.cli import entry
from treering.influence.tables import read_scores

torch.set_num_threads(1)
TECHNIQUES = {"full": "full: ", "lora": "lora: {rank: 2}, tiledblock: {tile: 16}, tiledloss: , recompute: "}


def run(*arguments: object) -> int:
    return entry.run([str(argument) for argument in arguments])


@pytest.fixture(params=list(TECHNIQUES))
def trained(request, tmp_path, monkeypatch):
    """The folder of a configuration and of the run that it trained."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "model")
    chats(tmp_path / "chat.jsonl", 24)
    (tmp_path / "run.yaml").write_text(
        "model: {path: model, dtype: float32}\n"
        "data: {train: chat.jsonl, max_length: 96, cache: tokens}\n"
        f"techniques: {{{TECHNIQUES[request.param]}}}\n"
        "train: {steps: 3, tokens_per_step: 256, optimizer: {lr: 1e-2}}\n"
        "output: first\n"
    )
    assert run("train", "run.yaml") == 0
    return tmp_path


def test_a_run_is_indexed_asked_cleaned_and_trained_again(trained, capsys):
    assert run("influence", "build", "first", "--entries", 16, "--tokens", 512) == 0
    assert run("influence", "query", "first", "--text", "root wood leaf sap", "--to", "s.parquet", "-n", 3) == 0
    table = read_scores(trained / "s.parquet")
    assert len(table.documents) == 24 and "bm25" in table.baselines and np.abs(table.scores).max() > 0
    capsys.readouterr()
    assert run("influence", "clean", "s.parquet", "--remove", 4, "--to", "new") == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("train again: "))
    assert command[:3] == ["treering", "train", "first/config.yaml"] and run(*command[1:]) == 0
    assert len((trained / "new" / "chat.jsonl").read_bytes().splitlines()) == 20
    assert (trained / "first-cleaned" / "checkpoints" / "step-3").is_dir()


def test_a_training_document_explains_itself_best(trained):
    """The query is a record of the training data: no other document is as helpful for it, in cosine."""
    assert run("influence", "build", "first", "--entries", 64, "--tokens", 1024) == 0
    assert run("influence", "query", "first", "--data", "chat.jsonl", "--cosine", "--to", "s.parquet", "-n", 0) == 0
    table = read_scores(trained / "s.parquet")
    assert table.documents == table.queries
    assert (table.scores.argmax(0) == np.arange(24)).all()


def test_training_data_that_has_changed_since_the_build_is_refused(trained, capsys):
    assert run("influence", "build", "first", "--entries", 4, "--tokens", 256) == 0
    text = (trained / "chat.jsonl").read_text()
    for changed in (text.replace("say 3", "say 4", 1), text + text.splitlines()[0] + "\n"):
        (trained / "chat.jsonl").write_text(changed)
        assert run("influence", "query", "first", "--text", "sap", "--to", "s.parquet") == 5
        assert "has training data" in capsys.readouterr().err
    assert not (trained / "s.parquet").exists()
    (trained / "chat.jsonl").write_text(text)
    assert run("influence", "query", "first", "--text", "sap", "--to", "s.parquet") == 0


def test_tokens_of_the_first_documents_are_shaded_and_kept_in_the_table(trained, capsys):
    assert run("influence", "build", "first", "--kind", "exact", "--curvature", "identity") == 0
    capsys.readouterr()
    assert run("influence", "query", "first", "--text", "root sap", "--shade", 3, "--to", "s.parquet") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("── ")]
    table = read_scores(trained / "s.parquet")
    first = table.order("root sap")[:3]
    assert sorted(first.tolist()) == np.flatnonzero(np.diff(table.tokens.offsets)).tolist()
    for row in first:
        total = table.tokens.of(row).sum()
        np.testing.assert_allclose(total, table.scores[row, 0], atol=0.02 * np.abs(table.scores).max())
    assert run("influence", "scores", "s.parquet", "--shade", "run.yaml", "-n", 3) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("── ")]
    assert [line.split(" · ")[0] for line in again] == [line.split(" · ")[0] for line in shown] and len(again) == 3
    assert run("influence", "scores", "s.parquet", "--shade", "run.yaml", "-n", 4) == 4
    assert "has no scores of tokens; query with a larger --shade" in capsys.readouterr().err
