"""An index on disk: the same bytes whoever writes them and however often, complete or not there, doubted when read."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import on_ranks
from tests.same import assert_same
from tests.sketches.indexed import KINDS, build, contents, ids, recipe, rows, write_shard
from treering import CheckpointError, DataError, sketches
from treering.sketches import encode, shard_documents, writing
from treering.sketches.encoding import decode_module
from treering.store import disk


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "index"
    build(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "index")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind, tmp_path):
    of = build(tmp_path / "index", kind)
    index = sketches.open(tmp_path / "index")
    assert (index.documents, index.tokens, index.recipe) == (15, sum(range(1, 16)), of)
    assert index.ids([0, 14, 7]) == [ids(0, 15)[i] for i in (0, 14, 7)] and list(index.all_ids()) == ids(0, 15)
    assert index.token_counts().tolist() == list(range(1, 16))
    wanted = {}
    encoded = encode(of, rows(of, 0, 15), ids(0, 15))
    for module in of.modules:
        wanted[module.name] = decode_module(of, module, encoded[module.name])
    found = index.rows(range(15))
    assert all(torch.equal(found[name], x) for name, x in wanted.items())
    assert not found["c"][3].any()
    assert torch.equal(index.dense(3, 13), torch.cat([wanted[m.name][3:13] for m in of.modules], 1))
    assert index.bytes == sum(p.stat().st_size for p in (tmp_path / "index").glob("shard*"))


def test_the_size_of_a_row_is_known_before():
    assert recipe("psift").bytes_of_row == 60 + 63 + 15 + 3 * 2
    assert recipe("eigen-topk").bytes_of_row == 3 * (12 * 3 + 2)
    assert recipe("exact int4").bytes_of_row == 30 + 32 + 8 + 3 * 2
    wide = recipe("eigen-topk", {"a": (100, 100)})
    assert shard_documents(wide) == 1 << 16 and shard_documents(recipe("gradients", {"a": (9000, 9000)})) == 1


def test_any_library_reads_a_shard(written):
    tensors = load_file(written / "shard-00000.safetensors")
    assert tensors["codes.1"].shape == (5, 63) and tensors["scales"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["psift", "eigen-topk"])
def test_order_and_pieces_do_not_change_a_byte(kind, tmp_path):
    build(tmp_path / "one", kind)
    build(tmp_path / "two", kind, order=(2, 0, 1), pieces=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def shards_of_a_rank(folder, world):
    import torch.distributed as dist

    with writing(folder, recipe()) as writer:
        for number in range(dist.get_rank(), 3, world):
            write_shard(writer, number)
        dist.barrier()
        writer.publish(3)
    return sketches.open(folder).documents


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_write_the_bytes_of_one_process(world, written, tmp_path):
    assert on_ranks(world, shards_of_a_rank, tmp_path / "index", world) == [15] * world
    assert contents(tmp_path / "index") == contents(written)


class Killed(BaseException):
    pass


def test_a_writer_that_is_killed_leaves_complete_shards_and_the_next_one_resumes(written, tmp_path, monkeypatch):
    folder, seen = tmp_path / "index", []
    killed_at = 0
    while True:  # at the first touch of the disk, at the second, …, until nothing is left to interrupt
        touches = iter(range(10**6))

        def crossing(point, touches=touches, last=killed_at):
            if next(touches) == last:
                raise Killed

        monkeypatch.setattr(disk, "crossing", crossing)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with writing(folder, recipe()) as writer:
                for number in range(3):
                    write_shard(writer, number)
        except Killed:
            killed_at += 1
        else:
            break
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="an unfinished index; run its build again"):
            sketches.open(folder)
        with writing(folder, recipe()) as writer:
            done = [writer.is_complete(n, ids(5 * n, 5 * n + 5)) for n in range(3)]
            seen.append(sum(done))
            for number in range(3):
                if not done[number]:
                    write_shard(writer, number)
            writer.publish(3)
        assert contents(folder) == contents(written)
    assert set(seen) >= {0, 1, 2} and seen == sorted(seen)


def test_files_of_a_killed_process_are_removed(written, tmp_path):
    folder = tmp_path / "index"
    with writing(folder, recipe()) as writer:
        write_shard(writer, 0)
    (folder / "shard-00001.safetensors.tmp-0123abcd").write_bytes(b"half a shard")
    with writing(folder, recipe()) as writer:
        assert writer.is_complete(0) and not writer.is_complete(1)
        for number in (1, 2):
            write_shard(writer, number)
        writer.publish(3)
    assert contents(folder) == contents(written)


def test_an_unfinished_index_is_not_continued_with_something_else(tmp_path):
    with writing(tmp_path, recipe()) as writer:
        write_shard(writer, 0)
    refused(r"the unfinished index .* has the digest of the model m1, not m2", tmp_path, recipe(model="m2"))
    with writing(tmp_path, recipe()) as writer:
        with pytest.raises(CheckpointError, match=r"other documents: .*4#0' is at place 4, where 'nothing' is wanted"):
            writer.is_complete(0, ids(0, 4))
        write_shard(writer, 1)
        with pytest.raises(CheckpointError, match=r"shard-00001.safetensors, which is not among the 1 shards"):
            writer.publish(1)
        with pytest.raises(CheckpointError, match=r"lacks 1 of 3 shards, shard-00002.safetensors first"):
            writer.publish(3)
        writer.drop(1)
        assert not writer.is_complete(1)
        writer.publish(1)
    assert sketches.open(tmp_path).documents == 5


def test_shards_are_appended_to_a_published_index(folder, tmp_path):
    before = contents(folder)
    opened = sketches.open(folder)
    with writing(folder, recipe(), append=True) as writer:
        assert writer.first == 3
        with pytest.raises(CheckpointError, match="published and never changed"):
            write_shard(writer, 2)
        write_shard(writer, 3)
    assert sketches.open(folder).documents == 15, "what is not published is not there"
    with writing(folder, recipe(), append=True) as writer:
        assert writer.is_complete(3)
        write_shard(writer, 4, total=22)
        writer.publish(5)
    index = sketches.open(folder)
    assert index.documents == 22 and list(index.all_ids()) == ids(0, 22)
    after = contents(folder)
    assert all(after[name] == content for name, content in before.items() if name != "index.json")
    assert opened.documents == 15 and torch.equal(opened.dense(0, 15), index.dense(0, 15))
    build(tmp_path / "at once", shards=5, total=22)
    assert contents(tmp_path / "at once") == after


def refused(message, folder, of, **how):
    with pytest.raises(CheckpointError, match=message), writing(folder, of, **how):
        pass


def test_what_cannot_be_written_is_refused(folder, tmp_path):
    refused("has a complete index; add documents to it with append", folder, recipe())
    refused("has kind psift, not eigen-topk", folder, recipe("eigen-topk"), append=True)
    refused("no index to append to", tmp_path / "new", recipe(), append=True)
    assert not (tmp_path / "new").exists()
    refused(r"new needs [\d,]+ MiB for 1,000,000,000,000 documents", tmp_path / "new", recipe(), documents=10**12)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    refused("is a file", tmp_path / "file", recipe())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    refused(r"holds model.safetensors; give an index a folder of its own", tmp_path / "other", recipe())
    (tmp_path / "lost").mkdir()
    shutil.copy(folder / "shard-00000.safetensors", tmp_path / "lost")
    refused("belongs to no index", tmp_path / "lost", recipe())
    with writing(tmp_path / "empty", recipe()) as writer:
        with pytest.raises(CheckpointError, match="has no shard"):
            writer.publish(0)
        with pytest.raises(DataError, match=r"shard 0 of .* has no document"), writer.shard(0):
            pass


def test_rows_that_are_no_rows_are_refused_by_the_name_of_the_document(tmp_path):
    of = recipe()
    for bad in (torch.nan, torch.inf, -torch.inf):
        given = rows(of, 0, 5)
        given["b"][3, 62] = bad
        with writing(tmp_path, of) as writer:
            message = r"gradient of übung.jsonl:3#0 is not finite in b"
            with pytest.raises(DataError, match=message), writer.shard(0) as shard:
                shard.add(ids(0, 5), range(5), given)
            assert not writer.is_complete(0)
    with writing(tmp_path, of) as writer, writer.shard(0) as shard:
        with pytest.raises(DataError, match="c came with no rows"):
            shard.add(ids(0, 5), range(5), {k: v for k, v in rows(of, 0, 5).items() if k != "c"})
        with pytest.raises(DataError, match=r"a came with rows of \(5, 60\); \(4, 60\) are wanted"):
            shard.add(ids(0, 4), range(4), rows(of, 0, 5))
        with pytest.raises(DataError, match="one for each"):
            shard.add(ids(0, 5), range(4), rows(of, 0, 5))
        with pytest.raises(DataError, match="one for each"):
            shard.add(["", *ids(1, 5)], range(5), rows(of, 0, 5))
        shard.add(ids(0, 5), range(5), rows(of, 0, 5))


def test_a_full_disk_leaves_what_was_complete(tmp_path, monkeypatch):
    with writing(tmp_path, recipe()) as writer:
        write_shard(writer, 0)

        def full(point):
            if point == "shard: flush":
                raise OSError(28, os.strerror(28))

        monkeypatch.setattr(disk, "crossing", full)
        with pytest.raises(CheckpointError, match=r"shard-00001.safetensors cannot be written: No space left"):
            write_shard(writer, 1)
        monkeypatch.undo()
        assert writer.is_complete(0) and not writer.is_complete(1)
        assert {path.name for path in tmp_path.iterdir()} == {"building.json", "shard-00000.safetensors"}


def test_rows_encoded_on_another_rank_are_the_same(written, tmp_path):
    of = recipe()
    with writing(tmp_path / "index", of) as writer:
        for n in range(3):
            with writer.shard(n) as shard:
                for i in range(5 * n, 5 * n + 5):
                    shard.add_encoded(ids(i, i + 1), [i + 1], encode(of, rows(of, i, i + 1), ids(i, i + 1)))
        writer.publish(3)
    assert contents(tmp_path / "index") == contents(written)


def test_a_long_row_has_its_place_in_the_dense_block(tmp_path):
    of = build(tmp_path / "index", "gradients")
    index = sketches.open(tmp_path / "index")
    given = rows(of, 0, 15)
    assert_same(index.dense(0, 15)[:, 60:123], given["b"], 0.005)
    with pytest.raises(DataError, match="the index has 15"):
        index.dense(3, 16)
