"""`treering influence validate`, by commands alone: trained again on halves, resumed, compared, refused."""

import json
import re

import numpy as np
import pytest
import torch

from tests.toy_run import chats, folder, job
from treering.cli import entry
from treering.data.examples import build
from treering.influence import retraining
from treering.influence.validate import half_subsets
from treering.store.untrusted import open_tokenizer
from treering.train.run import train

torch.set_num_threads(1)


def run(*arguments: object) -> int:
    return entry.run([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("validate")
    folder(root / "model")
    chats(root / "chat.jsonl", 24)
    (root / "asked.jsonl").write_text("".join((root / "chat.jsonl").open().readlines()[:3]))
    (root / "run.yaml").write_text(
        f"model: {{path: {root}/model, dtype: float32}}\n"
        f"data: {{train: {root}/chat.jsonl, max_length: 96, cache: {root}/tokens}}\n"
        "techniques: {lora: {rank: 2}}\n"
        "train: {epochs: 1, tokens_per_step: 256, optimizer: {lr: 1e-2}}\n"
        f"output: {root}/first\n"
    )
    assert run("train", root / "run.yaml") == 0
    assert run("influence", "build", root / "first", "--kind", "exact", "--curvature", "identity") == 0
    assert run("influence", "build", root / "first", "--entries", 16, "--tokens", 512) == 0
    return root


def losses(place):
    return {path.name: path.read_bytes() for path in place.glob("*.json")}


def test_an_index_is_compared_with_retraining_and_resumes(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "planted").write_text("chat.jsonl:1\nchat.jsonl:2\n")
    ask = ("influence", "validate", trained / "first", "--queries", trained / "asked.jsonl", "--subsets", 4)
    ask += ("--index", "eigen-topk-ekfac-16", "--leave-out", 2, "--planted", tmp_path / "planted")

    calls = []

    def interrupted(*arguments, **options):
        calls.append(options["kept"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(retraining, "train", interrupted)
        assert run(*ask, "--to", tmp_path / "v") != 0
    assert [int(kept.sum()) for kept in calls] == [12, 12, 12]
    before = losses(tmp_path / "v")
    assert len(before) == 3
    capsys.readouterr()
    assert run(*ask, "--to", tmp_path / "v") == 0
    out = " ".join(capsys.readouterr().out.split())
    number, left = map(int, re.search(r"(\d+) trainings into .* (\d+) to go, about", out).groups())
    assert 4 + 1 + 2 < number <= 4 + 1 + 3 + 2 and left == number - 2
    assert "LDS" in out and "bm25" in out and "exact-identity" in out and "recall of planted" in out
    after = losses(tmp_path / "v")
    assert len(after) == number + 1 and before.items() <= after.items()
    assert not [path for path in (tmp_path / "v").iterdir() if path.is_dir()]

    capsys.readouterr()
    assert run(*ask, "--to", tmp_path / "v") == 0  # nothing is left to train
    assert "to go" not in capsys.readouterr().out and losses(tmp_path / "v") == after


def test_without_nothing_the_run_itself_comes_out(trained, tmp_path):
    """The same bits: a training without no record gives the losses of the run that was indexed."""
    from treering.cli.influence_folder import config_of
    from treering.cli.influence_run import opened
    from treering.cli.train import job_of
    from treering.influence.retraining import Retraining, query_losses

    of_run = opened(job_of(config_of(trained / "first")), None)
    queries = of_run.records([str(trained / "asked.jsonl")])
    again = Retraining(of_run=of_run, queries=queries, folder=tmp_path / "v")
    again.open()
    assert again.losses([]).tolist() == query_losses(of_run.run, queries)
    without = again.losses([again.records[0]])
    assert without[0] > again.losses([])[0]  # the query is that very record


def test_documents_that_are_left_out_train_nothing_and_move_no_other(tmp_path):
    toy = job(tmp_path)
    examples = build(toy.data, open_tokenizer(tmp_path / "model"), "train")
    kept = half_subsets(len(examples), 1, 0)[0]
    only = examples.only(kept)
    assert kept.sum() == len(examples) // 2 and (only.lengths == examples.lengths).all()
    assert only.digest != examples.digest and only.trained[~kept].sum() == 0
    for i in range(len(examples)):
        same, whole = only.document(i), examples.document(i)
        assert np.array_equal(same.ids, whole.ids) and same.sample_id == whole.sample_id
        assert np.array_equal(same.mask, whole.mask & kept[i])


def test_a_step_of_documents_that_are_all_left_out_is_no_failure(tmp_path):
    toy = job(tmp_path, train={"steps": 4, "tokens_per_step": 128})
    kept = np.zeros(40, dtype=bool)
    kept[0] = True
    summary = train(toy, kept=kept)
    assert summary["steps"] == 4 and summary["skipped"] == 0


def test_refusals_say_what_to_do(trained, tmp_path, capsys):
    ask = ("influence", "validate", trained / "first", "--queries", trained / "asked.jsonl")
    ask += ("--index", "exact-identity", "--to", tmp_path / "v")

    def refused(code, words, *more):
        assert run(*ask, *more) == code
        assert words in " ".join(capsys.readouterr().err.split())

    refused(2, "subsets is 2; it is at least 3", "--subsets", 2)
    refused(2, "leave_out is 13 of 24 records", "--leave-out", 13)
    (tmp_path / "planted").write_text("chat.jsonl:99\n")
    refused(4, "'chat.jsonl:99' is planted, and not a record", "--planted", tmp_path / "planted")
    (tmp_path / "planted").write_text("\n")
    refused(4, "names no record", "--planted", tmp_path / "planted")
    refused(4, "cannot be read", "--planted", tmp_path / "absent")
    assert not (tmp_path / "v").exists()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "thesis.txt").write_text("years of work")
    refused(5, "something else than a validation; give another --to")
    (tmp_path / "v" / "thesis.txt").unlink()
    (tmp_path / "v" / "validation.json").write_text(json.dumps({"format": 1, "run": "another"}))
    refused(5, "has losses of another run and base model and training data and queries")
