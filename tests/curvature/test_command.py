"""`treering measure`: text in, a folder out, and a table."""

import os
import subprocess
import sys

import pytest
import torch

import treering as tr
from tests.ranks import PATIENCE, on_ranks
from tests.toy_run import chats, folder
from treering.cli import entry
from treering.curvature import open as open_statistics
from treering.plan import compose
from treering.store.untrusted import open_tokenizer
from treering.train.calibration import generated


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the token cache
    folder(tmp_path / "model", max_position_embeddings=128)
    chats(tmp_path / "chat.jsonl")
    return tmp_path


def call(place, *arguments):
    return entry.run(["measure", str(place / "model"), "--max-length", "64", *map(str, arguments)])


def test_text_is_measured_and_told_about(place, capsys):
    assert call(place, "--data", place / "chat.jsonl", "--tokens", 200, "--to", place / "old") == 0
    out = capsys.readouterr().out
    found = open_statistics(place / "old")
    assert found.rings[0].tokens == 200 and found.rings[0].name == "chat.jsonl" and found.rings[0].date
    assert "q_proj k_proj v_proj" in out and "200" in out and "14 weights" in out
    found.check(compose(place / "model", [tr.Full()]).plan.anatomy)


def test_a_measurement_that_is_too_short_says_how_long_would_do(place, capsys):
    assert call(place, "--data", place / "chat.jsonl", "--tokens", 96, "--to", place / "few") == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "14 of 14 weights were measured on fewer than 4 tokens for each input dimension" in out
    assert "About 192 tokens would do, instead of 96" in out
    assert call(place, "--data", place / "chat.jsonl", "--tokens", 192, "--to", place / "enough") == 0
    assert "tokens would do" not in capsys.readouterr().out


def test_rings_are_added_to_earlier_ones(place, capsys):
    data = ("--data", place / "chat.jsonl", "--tokens", 100)
    assert call(place, *data, "--to", place / "one") == 0
    assert call(place, *data, "--seed", 1, "--trained", "--add", place / "one", "--to", place / "two") == 0
    one, two = open_statistics(place / "one"), open_statistics(place / "two")
    assert len(two.rings) == 2 and two.rings[0] == one.rings[0] and 0 < two.rings[1].tokens < 100
    assert call(place, *data, "--add", place / "nowhere", "--to", place / "three") == 5
    assert "nowhere holds no statistics.json" in capsys.readouterr().err
    assert not (place / "three").exists()


def test_the_model_writes_its_own_text(place):
    arguments = ("--generate", "--tokens", 150)
    assert call(place, *arguments, "--to", place / "one") == 0
    assert call(place, *arguments, "--to", place / "again") == 0
    assert call(place, *arguments, "--seed", 1, "--to", place / "other") == 0
    one, again, other = (open_statistics(place / n) for n in ("one", "again", "other"))
    assert one.digest == again.digest != other.digest
    assert one.rings[0].name == "generated" and one.rings[0].tokens == 150


def written(model, at_once):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    run = compose(model, [tr.Full(), *([tr.Shard()] if ranks > 1 else [])])
    texts = generated(run, open_tokenizer(model), tokens=90, length=20, seed=3, at_once=at_once)
    return [d.ids.tolist() for d in texts]


def test_what_is_written_does_not_depend_on_the_ranks(place):
    (alone,) = on_ranks(1, written, place / "model", 4)
    one, two = on_ranks(2, written, place / "model", 2)
    assert one == two == alone
    assert sum(map(len, alone)) >= 90 and all(2 <= len(ids) <= 20 and ids[0] == 257 for ids in alone)
    assert all(257 not in ids[1:-1] for ids in alone)
    assert len(set(map(tuple, alone))) == len(alone)


def test_samples_follow_the_model(tmp_path):
    """A model that knows one sentence writes it, whatever the seed, and stops at its end."""
    model = folder(tmp_path / "model")
    run = compose(model, [tr.Full()])
    sentence = [10, 20, 30, 40, 257]

    def forward(input_ids, past_key_values=None, use_cache=True):
        step = (past_key_values or 0) + input_ids.shape[1]
        logits = torch.full((*input_ids.shape, 258), -1e4)
        logits[:, -1, sentence[(step - 1) % 5]] = 0.0
        return type("Out", (), {"logits": logits, "past_key_values": step})()

    run.model.forward = forward
    texts = generated(run, open_tokenizer(model), tokens=9, length=50)
    assert [d.ids.tolist() for d in texts] == [[257, *sentence], [257, *sentence]]


WRONG = {
    "no text": ([], 2, "--data FILE, or --generate"),
    "both kinds": (["--data", "x", "--generate"], 2, "one of the two"),
    "answers in written text": (["--generate", "--trained"], 2, "leave one of them out"),
    "too long": (["--generate", "--max-length", "4096"], 3, "--max-length 128"),
    "no such file": (["--data", "nowhere.jsonl"], 4, "nowhere.jsonl"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_measured_is_said(place, capsys, wrong):
    arguments, code, says = WRONG[wrong]
    assert call(place, *arguments, "--to", place / "old") == code
    assert says in capsys.readouterr().err
    assert not (place / "old").exists()


def test_a_folder_of_something_else_is_never_written_to(place, capsys):
    before = sorted(p.name for p in (place / "model").iterdir())
    assert call(place, "--generate", "--to", place / "model") == 5
    assert "folder of their own" in capsys.readouterr().err
    assert sorted(p.name for p in (place / "model").iterdir()) == before


def test_rings_that_are_there_are_not_lost(place, capsys):
    arguments = ("--data", place / "chat.jsonl", "--tokens", 50, "--to", place / "old")
    assert call(place, *arguments) == 0
    assert call(place, *arguments) == 5
    assert f"--add {place / 'old'}" in capsys.readouterr().err
    assert call(place, *arguments, "--add", place / "old") == 0
    assert len(open_statistics(place / "old").rings) == 2
    assert call(place, *arguments[:3], 10**6, "--to", place / "all") == 0
    assert "of 1,000,000 tokens: there is no more text" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [(), ("--gradients", "ekfac")], ids=str)
def test_two_ranks_of_the_command_measure_what_one_does(place, gradients):
    arguments = ["--data", place / "chat.jsonl", "--tokens", 200, "--max-length", 64, *gradients]
    assert call(place, *arguments[:4], *gradients, "--to", place / "one") == 0
    command = [sys.executable, "-m", "treering", "measure", place / "model", *arguments, "--to", place / "two"]
    done = subprocess.run(
        list(map(str, [*command, "--nproc", 2])), env=os.environ, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    one, two = open_statistics(place / "one"), open_statistics(place / "two")
    assert [(r.tokens, r.data) for r in one.rings] == [(r.tokens, r.data) for r in two.rings]
    assert two.digest == one.digest and (not gradients or two.gradients.digest == one.gradients.digest)


def test_gradients_are_measured_and_what_has_none_is_said(place, capsys):
    data = ("--data", place / "chat.jsonl", "--tokens", 200, "--gradients", "ekfac")
    assert call(place, *data, "--to", place / "one") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "factors of gradients will take up to" in out and "gradients: ekfac of" in out and "sampled labels" in out
    assert "they cover 14 matrices:" in out and "without factors:" in out and "outside the blocks" in out
    factors = open_statistics(place / "one").gradients
    assert factors.complete and factors.settings.kind == "ekfac"
    assert call(place, *data, "--to", place / "one") == 5  # complete: it would be overwritten
    assert "holds statistics already" in capsys.readouterr().err
    for wrong in (("--add", place / "one"), ("--trained",)):
        assert call(place, *data, *wrong, "--to", place / "three") == 2
        assert "--gradients measures both" in capsys.readouterr().err


def test_the_report_says_what_is_exact_projected_or_left_out(place, capsys):
    data = ("--data", place / "chat.jsonl", "--tokens", 200, "--gradients", "kfac", "--cover", "all")
    assert call(place, *data, "--to", place / "one") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "% exact" in out and "% projected on the side of the vocabulary" in out and "without factors" not in out
    assert open_statistics(place / "one").gradients.settings.cover == "all"
