"""`treering inspect` on a checkpoint: what it holds, and whether it is still what was written."""

import pytest
import torch

from treering.cli.inspect import describe
from treering.core.errors import CheckpointError
from treering.train.checkpoints import files as checkpoint

FACTS = {
    "identity": {"model": "org/model", "techniques": ["Full()", "LoRA(rank=2)"], "optimizer": "adamw", "seed": 7},
    "counts": {"best": None},
}


@pytest.fixture
def saved(tmp_path):
    weights = {f"model.layers.{i}.up.weight": torch.ones(8, 4) for i in range(3)}
    moments = {f"optimizer/{name}/exp_avg": value for name, value in weights.items()}
    return checkpoint.save(tmp_path, 12, weights | moments | {"state/basis": torch.ones(5)}, FACTS)


def test_a_checkpoint_is_told_by_its_manifest(saved):
    report = describe(saved)
    assert report.kind == "checkpoint" and not report.damage
    wanted = {
        "step": "12",
        "ranks": "1",
        "model": "org/model",
        "techniques": "Full(), LoRA(rank=2)",
        "optimizer": "adamw",
        "size of weights": "384 B",
        "size of optimizer state": "384 B",
        "size of technique state": "20 B",
        "tensors": "7, 197 values",
    }
    assert {name: report.facts[name] for name in wanted} == wanted
    assert ("optimizer/model.layers.*.up.weight/exp_avg", 3) in {(row.name, row.times) for row in report.rows}


def test_only_verifying_reads_the_values(saved):
    (file,) = saved.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert not describe(saved).damage
    assert "rank-00000.safetensors is damaged" in describe(saved, verify=True).damage[0]
    file.write_bytes(content[:-1])
    assert "bytes instead of" in describe(saved).damage[0]
    file.unlink()
    assert "is missing" in describe(saved).damage[0]


def test_a_whole_one_is_said_to_be_so(saved):
    assert "every block" in describe(saved, verify=True).facts["verified"]


def test_a_manifest_that_was_touched_is_refused(saved):
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace("adamw", "sgdxx"))
    with pytest.raises(CheckpointError, match="sha256"):
        describe(saved)


def test_what_has_no_digests_is_not_verified(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        describe(tmp_path, verify=True)
