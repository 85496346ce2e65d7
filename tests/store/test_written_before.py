"""Files that the five writers before there was one store wrote: they open, and are written the same today."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from treering.core.errors import CheckpointError
from treering.curvature import Ring
from treering.curvature import disk as statistics
from treering.curvature import open as open_statistics
from treering.data import cache
from treering.data.encode import Encoded
from treering.plan.prepared import Prepared
from treering.train.checkpoints import files as checkpoint

FOLDER = Path(__file__).parent / "written_before"
RESULT = "0123456789abcdef0123456789abcdef"
COUNTS = {"skipped": 1, "best": None, "best_step": None, "without_improvement": 0}


def numbers(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


TENSORS = {"w": numbers(5, 3), "optimizer/w/step": torch.tensor(3.0), "half": numbers(4).bfloat16()}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_checkpoint_opens_and_is_written_byte_for_byte(tmp_path):
    saved = checkpoint.read(FOLDER / "checkpoints" / "step-3")
    assert saved.facts == {"counts": COUNTS} and not saved.prepared
    assert {n: t.read().tolist() for n, t in saved.tensors.items()} == {n: t.tolist() for n, t in TENSORS.items()}
    checkpoint.save(tmp_path, 3, TENSORS, {"counts": COUNTS})
    assert files(tmp_path) == files(FOLDER / "checkpoints")


def test_statistics_open_and_are_written_the_same_but_for_the_name_of_a_file(tmp_path):
    before = open_statistics(FOLDER / "statistics")
    assert before.rings == (Ring(name="before", tokens=7, data="0" * 32, date="2026-11-27"),)
    assert before["a.weight"]["inputs"].dtype == torch.float32
    with statistics.writing(tmp_path / "new", {"a": (3, 3)}, "llama", {"a.weight": "a"}, before.rings) as pages:
        pages.add("a", lambda: (numbers(3, 3), 7))
    old, new = (sorted(files(folder).items()) for folder in (FOLDER / "statistics", tmp_path / "new"))
    assert [name.partition("-")[0] for name, _ in new] == [name.partition("-")[0] for name, _ in old]
    assert new[0][1] == old[0][1]
    assert new[1][1].replace(new[0][0].encode(), old[0][0].encode()) == old[1][1]


def test_a_prepared_result_is_used_and_is_written_byte_for_byte(tmp_path):
    before = Prepared(shutil.copytree(FOLDER / "prepared", tmp_path / "old"))
    assert before.problem(RESULT, ("a.Q", "lost")) == ""
    assert torch.equal(before.rows(RESULT, "a.Q", 1, 3), numbers(4, 2)[1:3])
    new = Prepared(tmp_path / "new")
    new.write(RESULT, {"a.Q": numbers(4, 2), "lost": torch.tensor([0.5], dtype=torch.float64)})
    assert files(new.folder) == files(before.folder)


def test_a_token_cache_opens_and_is_written_with_the_same_values(tmp_path):
    arrays, manifest = cache.read(FOLDER / "tokens")
    assert manifest["key"] == "k" and arrays["offsets"].tolist() == [0, 3, 6] and arrays["rows"].tolist() == [0, 1]
    writer = cache.CacheWriter(tmp_path / "new")
    ids, mask = np.array([1, 2, 3], dtype="<u4"), np.array([False, True, True])
    documents = [Encoded(ids=ids, mask=mask, file=0, row=i, piece=0, truncated=False, endless=False) for i in range(2)]
    writer.add(documents)
    writer.publish({"key": "k"})
    again, manifest = cache.read(tmp_path / "new")
    assert all(np.array_equal(again[name], arrays[name]) and again[name].dtype == arrays[name].dtype for name in arrays)
    assert json.loads((tmp_path / "new" / "manifest.json").read_text()).keys() == {"key", "digest", "bytes"}


def test_a_token_cache_with_a_damaged_header_is_not_a_cache(tmp_path):
    folder = shutil.copytree(FOLDER / "tokens", tmp_path / "tokens")
    path = folder / "tokens.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U32"', b'"I32"'))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": cache.disk.digest(path)}))
    assert cache.read(folder) is None


def test_a_damaged_file_is_still_refused(tmp_path):
    folder = shutil.copytree(FOLDER / "checkpoints", tmp_path / "checkpoints")
    path = folder / "step-3" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    try:
        checkpoint.read(folder / "step-3")
    except CheckpointError as error:
        assert "is damaged: its block 0" in str(error)
    else:
        raise AssertionError("a flipped bit was read")
