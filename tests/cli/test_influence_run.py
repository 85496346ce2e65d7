"""`treering influence` on a trained run: built on one rank or two, asked, and refused where it is not the same run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import PATIENCE
from tests.toy_run import folder
from treering.cli import entry
from treering.influence.planted import planted_chats
from treering.influence.tables import read_scores

torch.set_num_threads(1)
RUN = """
model: {{path: {root}/model, dtype: float32}}
data: {{train: {root}/chat.jsonl, max_length: 256}}
techniques: {techniques}
train: {{epochs: 2, tokens_per_step: 1024, optimizer: {{lr: 1e-2}}}}
output: {root}/out
"""


def call(*arguments):
    return entry.run([*map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with adapters, trained."""
    root = tmp_path_factory.mktemp("influence")
    os.environ["HOME"] = str(root)  # the token cache
    folder(root / "model", max_position_embeddings=512)
    planted = planted_chats(24, 3)
    planted.write(root / "chat.jsonl")
    (root / "asked.jsonl").write_text(
        json.dumps(planted.query if isinstance(planted.query, dict) else planted.chats[0])
    )
    (root / "run.yaml").write_text(RUN.format(root=root, techniques="{lora: {rank: 4}}"))
    assert call("train", root / "run.yaml") == 0
    return root


@pytest.fixture
def root(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(trained))
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


def files(folder: Path):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix == ".safetensors"}


def test_a_run_is_indexed_and_asked(trained, root, capsys):
    assert call("influence", "build", root / "out", "--tokens", 2000, "--profile") == 0
    out = capsys.readouterr().out
    assert all(f" s  {step}" in out for step in ("measuring the curvature", "forward, backward and rows", "the probe"))
    assert "rows of 24 documents" in out and "eigen-topk-ekfac-42: 28 modules" in out and "not indexed" in out
    assert call("influence", "query", root / "out", "--data", trained / "asked.jsonl", "--to", root / "s.parquet") == 0
    out = capsys.readouterr().out
    assert "rank by bm25" in out and "wrote" in out
    table = read_scores(root / "s.parquet")
    assert len(table.documents) == 24 and table.about["method"] == "eigen-topk ekfac" and "bm25" in table.baselines
    assert call("influence", "query", root / "out", "--text", "Lyon", "--cosine", "--to", root / "t.parquet") == 0
    assert abs(read_scores(root / "t.parquet").scores).max() <= 1.01


def test_two_ranks_write_the_same_files(root):
    shutil.copytree(root / "out", root / "two")
    assert call("influence", "build", root / "out", "--tokens", 2000, "--kind", "psift") == 0
    command = [sys.executable, "-m", "treering", "influence", "build", root / "two", "--tokens", "2000"]
    done = subprocess.run(
        list(map(str, [*command, "--kind", "psift", "--nproc", 2])), env=os.environ, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = ({n: b for n, b in files(root / name / "influence").items() if "shard" in n} for name in ("out", "two"))
    assert one == two and len(one) > 3


def test_several_indexes_are_named_and_other_text_is_refused(trained, root, capsys):
    ask = ("influence", "query", root / "out", "--text", "Lyon", "--to", root / "s.parquet")
    assert call(*ask) == 5 and "has no index; build one" in capsys.readouterr().err
    assert call("influence", "build", root / "out", "--kind", "exact", "--curvature", "identity") == 0
    assert call("influence", "build", root / "out", "--tokens", 2000, "--kind", "psift") == 0
    assert call("influence", "build", root / "out", "--tokens", 1000, "--kind", "psift", "--size", 8) == 5
    assert "measured on other text" in capsys.readouterr().err
    assert call(*ask) == 5
    assert "has the indexes exact-identity, psift-kfac-16; name one" in capsys.readouterr().err.replace("\n", " ")
    assert call(*ask, "--index", "exact-identity") == 0
    assert call("influence", "query", root / "out", "--to", root / "x.parquet") == 2
    assert "there is no query" in capsys.readouterr().err


def test_a_text_that_is_the_id_of_a_record_is_refused(trained, root, capsys):
    ask = ("influence", "query", root / "out", "--text", "asked.jsonl:1", "--data", trained / "asked.jsonl")
    assert call(*ask, "--to", root / "s.parquet") == 2
    assert "'asked.jsonl:1' is a text and the id of a record" in " ".join(capsys.readouterr().err.split())
