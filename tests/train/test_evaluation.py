"""By which loss held-out documents are judged."""

import json

import pytest

import treering as tr
from tests.toy_run import folder, job
from treering.train import train
from treering.train.config import Evaluate


def evaluations(root, output, **loss):
    techniques = (tr.Full(), tr.TiledLoss(tile=50, **loss))
    settings = {"steps": 1, "evaluate": Evaluate(every=1)}
    train(job(root, output, techniques=techniques, data={"eval_fraction": 0.2}, train=settings))
    lines = [json.loads(line) for line in (root / output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"]


def test_held_out_documents_are_judged_without_what_only_training_adds(tmp_path):
    folder(tmp_path / "model")
    (plain,) = evaluations(tmp_path, "plain")
    (added,) = evaluations(tmp_path, "added", z_loss=0.05)
    (smooth,) = evaluations(tmp_path, "smooth", label_smoothing=0.5)
    # One small step apart: far closer than 0.05 · (log Σ exp)², which is more than 1 here.
    assert added["held_out_loss"] == pytest.approx(plain["held_out_loss"], abs=0.1)
    assert added["objective"] > added["held_out_loss"] + 0.5
    assert smooth["held_out_loss"] != smooth["objective"] and "objective" not in plain
