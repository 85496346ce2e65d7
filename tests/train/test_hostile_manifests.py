"""Manifests of checkpoints from others: each is refused by a message that names the folder, without a wait."""

import os
from contextlib import suppress

import pytest
import torch

import treering as tr
from tests.chaos.damage import unseal
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints import manifest, state
from treering.train.checkpoints.manager import Progress

FACTS = {
    "identity": {"model": "org/model", "techniques": ["Full()"], "dtype": ["float32"], "seed": 7, "statistics": None},
    "counts": {"best": 1.5, "skipped": 0},
    "eval": None,
}
ESCAPE = "\x1b]0;owned\x07w\u202e"


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, 5, {"w": torch.ones(3, 2), ESCAPE: torch.ones(2)}, FACTS)


def refused(folder, *texts):
    """Refused by whoever reads the folder, and passed over with one warning that a terminal can print."""
    with pytest.raises(tr.CheckpointError) as caught:
        checkpoint.read(folder)
    for text in (str(folder), *texts):
        assert text in str(caught.value)
    warnings: list[str] = []
    assert checkpoint.newest(folder.parent, warnings.append) is None
    assert len(warnings) == 1 and warnings[0].isprintable()
    assert str(caught.value).isprintable()


def test_a_checkpoint_keeps_names_that_a_terminal_would_obey(saved):
    assert set(checkpoint.read(saved).tensors) == {"w", ESCAPE}


def test_a_pipe_in_place_of_a_manifest_is_refused_without_a_wait(saved):
    (saved / "manifest.json").unlink()
    os.mkfifo(saved / "manifest.json")
    refused(saved, "is a pipe, a socket or a device")


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/hostname", "../elsewhere.json"])
def test_a_link_in_place_of_a_manifest_is_refused_unread(saved, target):
    os.rename(saved / "manifest.json", saved.parent / "elsewhere.json")
    (saved / "manifest.json").symlink_to(target)
    refused(saved, "is a pipe, a socket or a device" if target == "/dev/zero" else "is a link that leads out of")


@pytest.mark.parametrize(
    "facts",
    [
        [["identity", 1]],
        None,
        {"identity": []},
        {"identity": {"techniques": 5}},
        {"identity": {"techniques": [5]}},
        {"identity": {"dtype": "float32"}},
        {"identity": {"statistics": {"a": 1}}},
        {"identity": {"seed": 10**400}},
        {"counts": []},
        {"counts": {"skipped": [1]}},
        {"counts": {"best": float("nan")}},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_facts_of_another_form_are_refused(saved, facts):
    unseal(lambda content: content.update(facts=facts))(saved)
    refused(saved, "is not a manifest")


def test_facts_that_were_never_written_are_no_error(saved):
    unseal(lambda content: content.update(facts={"of my own": [1, {"a": None}]}))(saved)
    read = checkpoint.read(saved)
    assert read.facts == {"of my own": [1, {"a": None}]}
    with pytest.raises(tr.CheckpointError, match="was not saved by the trainer"):
        Progress.restore(read)


def test_nesting_is_bounded(saved):
    nested: list = []
    for _ in range(100):
        nested = [nested]
    unseal(lambda content: content["facts"].update(of_mine=nested))(saved)
    refused(saved, "nested more than 64 deep")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": []},
        {"dtype": {}},
        {"shape": [1] * 40},
        {"shape": [10**30, 0]},
        {"chunks": [{"file": ESCAPE, "start": 0, "stop": 3}]},
        {"chunks": [{"file": "gone.safetensors", "start": 0, "stop": 3}]},
        {"chunks": []},
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("name", ["w", ESCAPE], ids=["plain", "escapes"])
def test_tensors_of_another_form_are_refused(saved, name, change):
    unseal(lambda content: content["tensors"][name].update(change))(saved)
    refused(saved)


def test_names_of_a_damaged_file_are_spelled_out(saved):
    unseal(lambda content: content["tensors"].pop(ESCAPE))(saved)
    refused(saved, "does not hold what the manifest lists: \\x1b]0;owned\\x07w\\u202e")


def test_a_tensor_twice_in_a_file_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 5, {"a": torch.ones(2), "b": torch.ones(2)}, {})
    file = folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"b"', b'"a"'))
    reseal(folder, file)
    refused(folder, "a name stands twice in its header")


def reseal(folder, file):
    from treering.store import disk

    length, blocks = disk.digests(file)
    unseal(lambda content: content["files"].update({file.name: {"bytes": length, "blocks": blocks}}))(folder)


@pytest.mark.parametrize("name", ["optimizer/w", "optimizer/w/exp_avg/more", f"optimizer/{ESCAPE}"])
def test_optimizer_state_without_a_parameter_is_refused(tmp_path, name):
    folder = checkpoint.save(tmp_path, 5, {name: torch.ones(2)}, {})
    with pytest.raises(tr.CheckpointError, match="which names no parameter") as caught:
        state.restore_optimizers(None, [], checkpoint.read(folder).tensors)
    assert str(caught.value).isprintable()


def test_a_manifest_of_many_values_is_refused_before_it_is_parsed(saved, monkeypatch):
    monkeypatch.setattr(manifest, "MOST_VALUES", 10)
    with suppress(KeyError):
        unseal(lambda content: content["facts"].update(of_mine=[[]] * 1000))(saved)
    refused(saved, "values; refused")
