"""The pieces that every writer uses: leftovers, atomic replacement, publication, free space."""

import os
import re
import signal

import pytest

from tests.ranks import RankFailed, on_ranks
from treering.data import cache
from treering.plan.prepared import Prepared
from treering.store import disk

OLD = re.compile(r"x\.tmp-\d")


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "x.tmp-1").mkdir()
    (tmp_path / "x.tmp-1" / "half").write_text("half")
    (tmp_path / "x.tmp-2").write_text("half")
    (tmp_path / "x").write_text("complete")
    with disk.writing_in(tmp_path, OLD):
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_another_writer_is_at_work_on_stays(tmp_path):
    with disk.writing_in(tmp_path, OLD):
        (tmp_path / "x.tmp-1").write_text("half")
        with disk.writing_in(tmp_path, OLD):
            assert (tmp_path / "x.tmp-1").exists()
    with disk.writing_in(tmp_path, OLD):
        assert not (tmp_path / "x.tmp-1").exists()


def killed_while_preparing(folder):
    import torch

    from treering.plan.prepared import TensorWriter

    TensorWriter.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    Prepared(folder).write("0" * 32, {"a": torch.ones(3)})


def test_a_killed_writer_of_a_prepared_result_is_swept_by_the_next(tmp_path):
    import torch

    with pytest.raises(RankFailed, match="exit code -9"):
        on_ranks(1, killed_while_preparing, tmp_path)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    Prepared(tmp_path).write("1" * 32, {"a": torch.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["1" * 32 + ".safetensors"]


def test_a_token_cache_that_was_never_finished_is_swept_by_the_next(tmp_path):
    (tmp_path / f"a.tmp-{'0' * 32}").mkdir()
    (tmp_path / f"a.old-{'0' * 32}").mkdir()
    writer = cache.CacheWriter(tmp_path / "b")
    assert len(list(tmp_path.iterdir())) == 1
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_a_sound_result_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    import torch

    first, second = Prepared(tmp_path), Prepared(tmp_path)
    first.write("0" * 32, {"a": torch.ones(3)})
    digest = first.digest("0" * 32)
    second.write("0" * 32, {"a": -torch.ones(3)})  # as another device might have it
    assert second.digest("0" * 32) == digest and second.find(digest) == "0" * 32
    (tmp_path / ("0" * 32 + ".safetensors")).write_bytes(b"damaged")
    second.write("0" * 32, {"a": -torch.ones(3)})
    assert second.problem("0" * 32, ["a"]) == "" and second.digest("0" * 32) != digest


def test_a_replaced_file_has_the_old_content_until_the_move(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    disk.replace(path, b"old")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        disk.replace(path, b"new")
    assert path.read_bytes() == b"old"
    disk.replace(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path):
    state = os.statvfs(tmp_path)
    assert disk.existing(tmp_path / "a" / "b") == tmp_path
    assert abs(disk.free(tmp_path / "a" / "b") - state.f_bavail * state.f_frsize) < 1 << 30


def test_one_digest_of_a_file_and_those_of_its_blocks_are_of_what_was_written(tmp_path):
    content = os.urandom(disk.BLOCK + 7)
    written = disk.write(tmp_path / "x", [content[:5], content[5:]])
    assert written == disk.digests(tmp_path / "x") and written[0] == len(content) and len(written[1]) == 32
    assert len(disk.digest(tmp_path / "x")) == 32
