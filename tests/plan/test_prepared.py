"""The prepared/ folder: what was split once is never split again, and nothing stale is ever taken for it."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.ranks import RankFailed, on_ranks
from tests.same import assert_all_same
from tests.toy import weights
from tests.zoo import build, save
from treering.core.sharded import gather
from treering.store.tensor_writer import TensorWriter
from treering.technique import Applied, Claim, Part, Stage

TARGETS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj")


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Owns three weights as two halves, and writes a line into `log` for each one that it splits."""

    log: str
    factor: float = 0.25
    fails_on: str = ""
    stage: ClassVar[Stage] = Stage.ADAPT

    def claims(self, anatomy, mesh):
        return [Claim(fqn=f"{name}.weight", aspect="storage", setting="halves") for name in TARGETS]

    def apply(self, model, site):
        parts, trainable = {}, []
        for name in TARGETS:
            module = model.get_submodule(name)
            whole = module.weight
            del module.weight
            for half in ("left", "right"):
                module.register_parameter(half, torch.nn.Parameter(torch.empty_like(whole)))
            module.forward = lambda x, module=module: x @ (module.left + module.right).T
            left, right = f"{name}.left", f"{name}.right"
            trainable += [left, right]
            parts[f"{name}.weight"] = Part(
                names=(left, right),
                split=self._splitter(name, left, right),
                join=lambda t, below, left=left, right=right: below + t[left] + t[right],
                keeps_base=False,
                tolerance=1e-2,
                cost=1.0,
            )
        return Applied(trainable=tuple(trainable), parts=parts)

    def _splitter(self, name, left, right):
        def split(weight, below, statistics):
            if name == self.fails_on:
                raise ValueError(f"the split of {name} went wrong")
            with open(self.log, "a") as log:
                log.write(f"{name}\n")
            W = weight.read()
            return {left: W * self.factor, right: W * (1 - self.factor)}

        return split


def splits(log: Path) -> list[str]:
    return sorted(log.read_text().split()) if log.exists() else []


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "prepared"


def loaded(log, cache, model=None, **how):
    settings = {k: how.pop(k) for k in ("factor", "fails_on") if k in how}
    run = tr.compose(
        model if model is not None else build("llama"), [Halves(log=str(log), **settings)], prepared=cache, **how
    )
    return {name: gather(p).clone() for name, p in run.model.named_parameters()}


def test_a_second_time_nothing_is_split_and_every_bit_is_the_same(log, cache):
    first = loaded(log, cache)
    assert splits(log) == sorted(TARGETS)
    files = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert len(files) == 3
    assert_all_same(loaded(log, cache), first)
    assert splits(log) == sorted(TARGETS)
    assert {p: p.stat().st_mtime_ns for p in cache.iterdir()} == files


def test_the_loss_at_load_is_remembered(log, cache):
    techniques = [tr.LoRA(rank=2, init="pissa", targets=("up_proj",))]
    first = tr.compose(build("llama"), techniques, prepared=cache).lost
    assert all(value > 0 for value in first.values()) and len(first) == 2
    assert tr.compose(build("llama"), techniques, prepared=cache).lost == first


def test_one_changed_bit_of_one_weight_is_split_again_alone(log, cache):
    loaded(log, cache)
    model = build("llama")
    with torch.no_grad():
        weight = model.get_submodule(TARGETS[0]).weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    loaded(log, cache, model)
    assert splits(log) == sorted([*TARGETS, TARGETS[0]])


@pytest.mark.parametrize("how", [{"factor": 0.5}, {"seed": 1}], ids=str)
def test_other_settings_or_another_seed_miss(log, cache, how):
    loaded(log, cache)
    loaded(log, cache, **how)
    assert len(splits(log)) == 6


@pytest.mark.parametrize("order", [("bfloat16", "float32"), ("float32", "bfloat16")], ids=str)
def test_another_dtype_of_the_same_file_misses(log, cache, tmp_path, order):
    folder = save("llama", tmp_path / "m")
    for dtype in order:
        values = loaded(log, cache, folder, dtype=dtype)
        alone = loaded(log, tmp_path / f"only {dtype}", folder, dtype=dtype)
        assert_all_same(values, alone)


def test_a_base_that_moves_is_kept_in_the_dtype_it_will_live_in(cache, tmp_path):
    """The adapter is float32 both times and the file is the same: only the base tells the two apart."""
    folder = save("llama", tmp_path / "m")
    pissa = [tr.LoRA(rank=2, init="pissa", targets=("up_proj",))]
    tr.compose(folder, pissa, dtype="bfloat16", prepared=cache)
    run = tr.compose(folder, pissa, dtype="float32", prepared=cache)
    assert max(run.lost.values()) < 1e-6
    wanted = dict(build("llama").named_parameters())
    assert_all_same(weights(run), {n: wanted[n] for n, _ in run.plain()}, 1e-6)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_made_again(log, cache, keep):
    first = loaded(log, cache)
    victim = sorted(cache.iterdir())[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:keep])
    assert_all_same(loaded(log, cache), first)
    assert len(splits(log)) == 4 and victim.read_bytes() == whole


def flipped(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def notes(log, cache, **settings):
    return tr.compose(build("llama"), [Halves(log=str(log), **settings)], prepared=cache).notes


@pytest.mark.parametrize("where", ["first value", "last value", "loss", "header", "length"])
def test_a_flipped_bit_is_found_and_the_result_made_again(where, log, cache):
    first = loaded(log, cache)
    victim = sorted(cache.iterdir())[0]
    whole = victim.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    loss = header["lost"]["data_offsets"][0]
    left = next(at["data_offsets"] for name, at in header.items() if name.endswith(".left"))
    places = {
        "first value": start + left[0],
        "last value": start + left[1] - 1,
        "loss": start + loss,
        "header": 8 + whole[8:start].index(b"digests") + 60,
        "length": 0,
    }
    flipped(victim, places[where])
    [note] = notes(log, cache)
    assert "1 of 3 prepared results had to be computed again" in note and victim.name in note and "damaged" in note
    assert len(splits(log)) == 4 and victim.read_bytes() == whole
    assert_all_same(loaded(log, cache), first)
    assert notes(log, cache) == ()


def test_any_bit_of_a_file_may_flip(log, cache):
    """None of them is believed; a few of the header's are blanks and do no harm."""
    first = loaded(log, cache)
    victim = sorted(cache.iterdir())[0]
    whole = victim.read_bytes()
    for i in range(0, len(whole), len(whole) // 60):
        flipped(victim, i, bit=i % 8)
        assert_all_same(loaded(log, cache), first)
        victim.write_bytes(whole)


def test_a_file_of_an_earlier_version_is_made_again_and_said_so(log, cache):
    first = loaded(log, cache)
    for path in cache.iterdir():
        save_file(load_file(path), path)  # as they were written: no digests
    flipped(sorted(cache.iterdir())[0], -1)
    [note] = notes(log, cache)
    assert "3 of 3 prepared results" in note and "earlier version, without digests" in note and "and 2 more" in note
    assert len(splits(log)) == 6
    assert_all_same(loaded(log, cache), first)
    assert len(splits(log)) == 6


def test_the_result_of_another_weight_under_this_name_is_not_believed(log, cache):
    first = loaded(log, cache)
    one, other, _ = sorted(cache.iterdir())
    one.write_bytes(other.read_bytes())
    assert "does not belong to it" in notes(log, cache)[0]
    assert_all_same(loaded(log, cache), first)


def test_a_note_is_part_of_what_is_explained(log, cache):
    loaded(log, cache)
    flipped(sorted(cache.iterdir())[0], -1)
    run = tr.compose(build("llama"), [Halves(log=str(log))], prepared=cache)
    assert run.notes[0] in run.explain()


def test_a_result_is_on_the_disk_before_it_has_its_name(log, cache, monkeypatch):
    seen = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "link", lambda *names: (seen.append("name"), link(*names))[1])
    loaded(log, cache)
    assert seen == ["fsync", "name", "fsync"] * 3


def test_a_full_disk_is_a_message(log, cache, monkeypatch):
    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorWriter, "open", full)
    with pytest.raises(
        tr.CheckpointError, match=r"cannot be written: No space left on device; it needs .* MiB are free there"
    ):
        loaded(log, cache)
    assert not list(cache.iterdir())


def test_a_folder_that_cannot_be_made_is_a_message(log, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tr.CheckpointError, match="for prepared tensors cannot be created"):
        loaded(log, tmp_path / "file" / "prepared")


def on_a_rank_with_notes(log, cache):
    run = tr.compose(build("llama"), [Halves(log=str(log)), tr.Shard()], prepared=cache)
    return {name: gather(p).clone() for name, p in run.model.named_parameters()}, run.notes


def test_ranks_check_their_share_and_all_know_of_the_damage(log, cache):
    wanted = loaded(log, cache)
    for path in cache.iterdir():
        flipped(path, -1)
    for values, messages in on_ranks(2, on_a_rank_with_notes, log, cache):
        assert_all_same(values, wanted)
        assert len(messages) == 1 and "3 of 3 prepared results had to be computed again" in messages[0]


def test_nothing_half_written_is_left_behind(log, cache):
    loaded(log, cache)
    assert all(p.suffix == ".safetensors" and not p.name.startswith(".") for p in cache.iterdir())


def test_what_a_crash_left_behind_is_not_read(log, cache):
    cache.mkdir()
    (cache / ".abc.def.tmp").write_bytes(b"half")
    loaded(log, cache)
    assert len(splits(log)) == 3


def on_a_rank(log, cache, settings):
    run = tr.compose(build("llama"), [Halves(log=str(log), **settings), tr.Shard()], prepared=cache)
    return {name: gather(p).clone() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_split_each_weight_once_and_slice_the_same_bits(log, cache, world, tmp_path):
    wanted = loaded(tmp_path / "other log", tmp_path / "other")
    for values in on_ranks(world, on_a_rank, log, cache, {}):
        assert_all_same(values, wanted)
    assert splits(log) == sorted(TARGETS)


def test_what_one_rank_prepared_two_ranks_read(log, cache):
    wanted = loaded(log, cache)
    for values in on_ranks(2, on_a_rank, log, cache, {}):
        assert_all_same(values, wanted)
    assert splits(log) == sorted(TARGETS)


def failing(log, cache):
    try:
        on_a_rank(log, cache, {"fails_on": TARGETS[1]})
    except tr.PlanError as error:
        return str(error)


def test_a_split_that_fails_on_one_rank_ends_all_with_its_message(log, cache):
    first, second = on_ranks(2, failing, log, cache)
    assert first == second and "ValueError: the split of model.layers.0.mlp.gate_proj went wrong" in first
    assert "rank 0" in first or "rank 1" in first
    loaded(log, cache)  # what the other splits made is not lost, and the failed one left nothing
    assert splits(log).count(TARGETS[1]) == 1


def without_a_folder():
    tr.compose(build("llama"), [tr.LoRA(rank=2, init="pissa"), tr.Shard()])


def test_several_ranks_need_a_folder():
    with pytest.raises(RankFailed, match=r"PlanError: a folder for prepared tensors is needed.*prepared=DIR"):
        on_ranks(2, without_a_folder)


def test_starts_that_read_nothing_cache_nothing(cache):
    tr.compose(build("llama"), [tr.LoRA(rank=2)], prepared=cache)
    assert not list(cache.iterdir())


def test_files_are_plain_safetensors(log, cache):
    loaded(log, cache)
    values = load_file(sorted(cache.iterdir())[0])
    assert sorted(name.rpartition(".")[2] for name in values) == ["left", "lost", "right"]
    save_file(values, cache / "copy.safetensors")
