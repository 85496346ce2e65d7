"""A folder of statistics: read lazily, added up ring by ring, never half-written, and doubted when it is opened."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.curvature.texts import documents, rows
from tests.same import assert_same
from tests.zoo import build
from treering.anatomy import examine
from treering.curvature import Ring, add, disk, observe
from treering.curvature import open as open_statistics

Q, K, DOWN = (f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


def measured(folder, lengths=(12, 7), seed=0, name="llama", **how):
    ring = Ring(name=f"text {seed}", tokens=0, data=f"data {seed}", date="2026-01-01")
    return tr.measure(build(name), [rows(documents(lengths, seed))], ring=ring, to=folder, **how)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "statistics"
    measured(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "statistics"))


def test_what_was_measured_is_read_again(folder):
    wanted = tr.measure(build("llama"), [rows(documents((12, 7)))])
    found = tr.curvature.open(folder)
    assert found.digest == wanted.digest and found.model_type == "llama"
    assert found.rings == (Ring(name="text 0", tokens=19, data="data 0", date="2026-01-01"),)
    for weight in wanted:
        assert torch.equal(found[weight]["inputs"], wanted[weight]["inputs"])
        assert int(found[weight]["tokens"]) == 19
    assert found.get("lm_head.weight") is None and Q in found and len(found) == 14


def test_tensors_are_read_when_they_are_asked_for_and_shared_ones_are_on_disk_once(folder):
    found = open_statistics(folder)
    (file,) = folder.glob("*.safetensors")
    assert len(load_file(file)) == 8
    assert found[Q]["inputs"] is found[K]["inputs"]
    file.unlink()
    with pytest.raises(tr.CheckpointError, match="cannot be read"):
        found[DOWN]


def test_rings_count_equally_however_long_they_are(folder, tmp_path):
    short, long = open_statistics(folder), measured(tmp_path / "long", (30, 30, 30), seed=1)
    both = add([folder, tmp_path / "long"], tmp_path / "both")
    assert [r.name for r in both.rings] == ["text 0", "text 1"]
    for weight in short:
        assert_same(both[weight]["inputs"], short[weight]["inputs"] + long[weight]["inputs"], 1e-7, weight)
        assert int(both[weight]["tokens"]) == 19 + 90
    three = add([both, long], tmp_path / "three")
    assert_same(three[Q]["inputs"], short[Q]["inputs"] + 2 * long[Q]["inputs"], 1e-6)
    assert len(three.tensors) == 8


def test_measuring_onto_earlier_rings_is_adding_to_them(folder, tmp_path):
    earlier = open_statistics(folder)
    measured(tmp_path / "new", (9, 4), seed=2)
    wanted = add([folder, tmp_path / "new"], tmp_path / "added")
    at_once = measured(tmp_path / "onto", (9, 4), seed=2, onto=[earlier])
    assert at_once.digest == wanted.digest and at_once.rings == wanted.rings
    in_memory = tr.measure(build("llama"), [rows(documents((9, 4), 2))], onto=[earlier])
    assert in_memory.digest == wanted.digest


def test_experts_add_up_each_on_its_own(tmp_path):
    one, two = (measured(tmp_path / n, (k,), seed=k, name="mixtral") for n, k in (("one", 1), ("two", 6)))
    both = add([one, two], tmp_path / "both")
    weight = "model.layers.1.mlp.experts.down_proj"
    assert_same(both[weight]["inputs"], one[weight]["inputs"] + two[weight]["inputs"], 1e-7)
    assert torch.equal(both[weight]["tokens"], one[weight]["tokens"] + two[weight]["tokens"])


def test_sharing_survives_only_where_all_rings_share(tmp_path):
    model = build("llama")
    with torch.no_grad(), observe(model, examine(model), share=False) as seen:
        model(**rows(documents()))
    together = tr.measure(model, [rows(documents())])
    both = add([together, seen.statistics()], tmp_path / "both")
    assert len(both.tensors) == 14
    assert_same(both[K]["inputs"], 2 * together[K]["inputs"], 1e-7)


def test_large_statistics_lie_in_several_files(tmp_path):
    found = measured(tmp_path / "one")
    shapes = {key: entry.shape for key, entry in found.tensors.items()}
    owners = {weight: entry.key for weight, entry in found.entries.items()}
    with disk.writing(tmp_path / "many", shapes, "llama", owners, found.rings, limit=9000) as pages:
        for key in reversed(shapes):
            pages.add(key, lambda key=key: (found[key]["inputs"], found.entries[key].tokens))
    many = open_statistics(tmp_path / "many")
    assert len({entry.file for entry in many.entries.values()}) > 2
    assert many.digest == found.digest and torch.equal(many[DOWN]["inputs"], found[DOWN]["inputs"])


def test_only_statistics_of_one_model_are_added(folder, tmp_path):
    measured(tmp_path / "gpt2", name="gpt2")
    with pytest.raises(tr.CheckpointError, match=r"llama and .* on gpt2"):
        add([folder, tmp_path / "gpt2"], tmp_path / "both")
    model = build("llama")
    with torch.no_grad(), observe(model, examine(model), weights=[Q]) as seen:
        model(**rows(documents()))
    with pytest.raises(tr.CheckpointError, match="differ in what they hold"):
        add([folder, seen.statistics()], tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("reached", ["first tensor", "last tensor", "before the JSON"])
def test_a_killed_writer_leaves_what_was_there(folder, monkeypatch, reached):
    before = open_statistics(folder)
    model, batch = build("llama"), rows(documents((5,), 9))

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    places = {
        "first tensor": (disk.TensorWriter, "add"),
        "last tensor": (disk.TensorWriter, "close"),
        "before the JSON": (os, "replace"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*places[reached], die)
        with pytest.raises(Killed):
            tr.measure(model, [batch], to=folder)
    assert open_statistics(folder).digest == before.digest
    assert len(list(folder.glob("*.safetensors"))) == 1
    after = tr.measure(model, [batch], to=folder)
    assert open_statistics(folder).digest == after.digest != before.digest
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert not list(folder.glob("*.tmp"))


def test_what_an_untimely_death_left_is_swept_up(folder):
    (folder / "statistics-0123abcd.safetensors").write_bytes(b"half")
    (folder / "statistics.json").unlink()
    with pytest.raises(tr.CheckpointError, match="treering measure MODEL"):
        open_statistics(folder)
    measured(folder, seed=3)
    assert len(list(folder.iterdir())) == 2 and open_statistics(folder).rings[0].name == "text 3"


def test_nothing_is_written_to_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(tr.CheckpointError, match=r"holds model\.safetensors"):
        measured(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(tr.CheckpointError, match="is a file"):
        measured(tmp_path / "model.safetensors")


def changed(folder, change):
    path = folder / "statistics.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


DAMAGE = {
    "another format": (lambda told: told.update(format=3), "format '3'"),
    "no rings": (lambda told: told.pop("rings"), "damaged"),
    "a ring without tokens": (lambda told: told["rings"][0].update(tokens=-1), "damaged"),
    "weights as a list": (lambda told: told.update(weights=[1]), "damaged"),
    "a weight of no tensor": (lambda told: told["weights"].update({Q: "x"}), "damaged"),
    "a moment that is not square": (lambda told: told["tensors"][Q].update(shape=[32, 31]), "damaged"),
    "a moment of another size": (lambda told: told["tensors"][Q].update(shape=[31, 31]), "does not hold"),
    "counts of experts for a matrix": (lambda told: told["tensors"][Q].update(tokens=[1, 2]), "damaged"),
    "more tokens than are counted": (lambda told: told["tensors"][Q].update(tokens=10**40), "damaged"),
    "a ring of more tokens": (lambda told: told["rings"][0].update(tokens=10**40), "damaged"),
    "a file as a list": (lambda told: told["tensors"][Q].update(file=[1]), "damaged"),
    "a file as a number": (lambda told: told["tensors"][Q].update(file=1), "damaged"),
    "a key of controls": (lambda told: told["weights"].update({Q: "\x1b[2J"}), r"KeyError: '\\x1b\[2J'"),
    "a file elsewhere": (lambda told: told["tensors"][Q].update(file="../x.safetensors"), "plain names"),
    "a file that is not there": (lambda told: told["tensors"][Q].update(file="x.safetensors"), "lacks"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_when_it_is_opened(folder, damage):
    change, says = DAMAGE[damage]
    changed(folder, change)
    with pytest.raises(tr.CheckpointError, match=says):
        open_statistics(folder)


def test_other_values_than_were_written_are_noticed(folder):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[DOWN][0, 0] += 1
    save_file(tensors, file)
    found = open_statistics(folder)
    assert found[Q]["inputs"].any()
    with pytest.raises(tr.CheckpointError, match="other values"):
        found[DOWN]


def test_a_folder_of_something_else_is_said_to_be_none(tmp_path):
    for path in (tmp_path, tmp_path / "not there"):
        with pytest.raises(tr.CheckpointError, match="treering measure MODEL --data FILE --to"):
            open_statistics(path)


def test_a_copy_is_whole_or_refused(folder, tmp_path):
    disk.copy_folder(folder, tmp_path / "copy")
    assert open_statistics(tmp_path / "copy").digest == open_statistics(folder).digest
