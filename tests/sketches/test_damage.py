"""What is not as it was written is refused: descriptions, shards, and any single byte of either."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.sketches.indexed import build, recipe, write_shard
from treering import CheckpointError, sketches
from treering.sketches import writing


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "index"
    build(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "index")


def change(path, work):
    description = json.loads(path.read_text())
    work(description)
    path.write_text(json.dumps(description))


DAMAGES = {
    "format": (lambda d: d.update(format=2), "has the format '2', and this version reads 1"),
    "a field more": (lambda d: d.update(date="today"), "'date', which this version does not know"),
    "a setting more": (lambda d: d["recipe"]["settings"].update(rank=3), "'rank', which this version does not know"),
    "a setting less": (lambda d: d["recipe"]["settings"].pop("seed"), "is damaged .KeyError: 'seed'"),
    "an impossible setting": (lambda d: d["recipe"]["settings"].update(size=0), "size is 0; it is a number from 1"),
    "an offset": (lambda d: d["recipe"]["modules"][1].update(offset=3), "the module 'b'"),
    "a size": (lambda d: d["recipe"]["modules"][0].update(rows=-6), "the sizes of 'a'"),
    "a digest": (lambda d: d["recipe"].update(model=3), "a digest that is not a text"),
    "no recipe": (lambda d: d.pop("recipe"), "is damaged .KeyError: 'recipe'"),
    "a recipe that is a list": (lambda d: d.update(recipe=[]), "is damaged"),
    "shards that are a number": (lambda d: d.update(shards=3), "is damaged"),
    "no shards": (lambda d: d.update(shards=[], documents=0, tokens=0), "no shard"),
    "documents": (lambda d: d.update(documents=16), "the number of documents"),
    "a file elsewhere": (lambda d: d["shards"][0].update(file="../x.safetensors"), "the file of shard 0"),
    "a negative size": (lambda d: d["shards"][0].update(bytes=-1), "the sizes of shard 0"),
    "another digest": (lambda d: d["shards"][1].update(digest="0" * 32), "its digest or size differs"),
    "a field of a shard": (lambda d: d["shards"][0].pop("tokens"), "the fields of shard 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_description_that_is_not_as_it_was_written_is_refused(name, folder):
    work, message = DAMAGES[name]
    change(folder / "index.json", work)
    with pytest.raises(CheckpointError, match=message):
        sketches.open(folder)


def test_damaged_shards_are_refused(folder):
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        sketches.open(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    index = sketches.open(folder)  # a value is noticed when the shard is used
    index.dense(0, 5)
    for use in (lambda: index.dense(4, 6), index.check_data, lambda: index.ids([5])):
        with pytest.raises(CheckpointError, match=r"shard-00001.safetensors has other values than were written"):
            use()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks shard-00001.safetensors"):
        sketches.open(folder)
    path.write_bytes((folder / "shard-00000.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is not the file that index.json lists"):
        sketches.open(folder)
    save_file({"tokens": torch.zeros(5, dtype=torch.int64)}, path)
    with pytest.raises(CheckpointError, match="does not have the tensors of a shard"):
        sketches.open(folder)


def test_a_shard_of_another_index_is_refused(folder, tmp_path):
    with writing(tmp_path / "other", recipe(model="m2")) as writer:
        write_shard(writer, 0)
    shutil.copy(tmp_path / "other" / "shard-00000.safetensors", folder)
    with pytest.raises(CheckpointError, match="is a shard of another index"):
        sketches.open(folder)


def test_folders_without_an_index_are_refused(tmp_path):
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"holds no index.json; build one: treering influence build"):
            sketches.open(missing)


@pytest.mark.parametrize("kind", ["psift", "eigen-topk"])
@pytest.mark.parametrize("name", ["index.json", "shard-00000.safetensors"])
def test_no_changed_byte_is_read_as_something_else(kind, name, tmp_path):
    build(tmp_path / "index", kind, shards=2)
    index = sketches.open(tmp_path / "index")
    wanted, documents = index.dense(0, 10), list(index.all_ids())
    path = tmp_path / "index" / name
    whole = path.read_bytes()
    random = torch.Generator().manual_seed(len(kind))
    refused = 0
    for place in torch.randint(len(whole), (150,), generator=random).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 7)]) + whole[place + 1 :])
        try:
            found = sketches.open(tmp_path / "index")
            assert torch.equal(found.dense(0, 10), wanted) and list(found.all_ids()) == documents
        except CheckpointError:
            refused += 1
    assert refused > (149 if name != "index.json" else 50)  # spaces of JSON, and texts that nothing compares here
