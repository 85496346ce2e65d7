"""What docs/checkpoints.md promises of runs that stop: bitwise on as many ranks, the same to rounding on others."""

import shutil

import pytest

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy_run import job
from treering.train.checkpoints.files import read


def trained(root, output):
    from treering.train import train

    train(job(root, output, techniques=(tr.Full(), tr.Shard())))


def tensors(root, output):
    return {n: t.read() for n, t in read(root / output / "checkpoints" / "step-12").tensors.items()}


@pytest.mark.parametrize(("ranks", "tolerance"), [(2, 0.0), (3, 1e-4), (1, 1e-4)])
def test_a_run_of_two_ranks_is_gone_on_with(tmp_path, ranks, tolerance):
    job(tmp_path)  # makes the toys before several ranks look for them
    on_ranks(2, trained, tmp_path, "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (10, 12):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")

    on_ranks(ranks, trained, tmp_path, "cut")

    assert "resumes after step 5" in (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert_all_same(tensors(tmp_path, "cut"), tensors(tmp_path, "whole"), tolerance)
