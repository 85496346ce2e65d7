"""Checkpoints that leave OSFT's operators to `prepared/`: smaller, bitwise, and what a missing folder does."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy_run import chats, folder, job
from treering.cli.inspect import describe
from treering.curvature import Ring
from treering.plan import prepared as results
from treering.plan.prepared import Prepared
from treering.plan.refill import completed, unsaved
from treering.store.tensor_writer import size
from treering.technique import Applied, Claim, Part, Stage
from treering.train import train
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints import manifest
from treering.train.config import Checkpoint, StatisticsSection
from treering.train.export import export, reopen

LAST, CUT = 8, 5


def settings(root, output, *, protect="inputs", self_contained=False, techniques=(), **changes):
    saving = Checkpoint(every=CUT, keep=5, self_contained=self_contained)
    return job(
        root,
        output,
        techniques=(tr.OSFT(protect=protect, ratio=0.4, keep_initial=True), *techniques),
        train={"steps": LAST, "checkpoint": saving},
        statistics=StatisticsSection(tokens=0),
        **changes,
    )


@pytest.fixture
def root(tmp_path):
    """A model whose folder has statistics, and chats."""
    model = folder(tmp_path / "model")
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "real": torch.ones(2, 40, dtype=torch.bool)}
    run = tr.compose(model, [tr.Full()])
    tr.measure(run, [batch], ring=Ring(name="old", tokens=0, data="old"), to=model / "statistics")
    chats(tmp_path / "chat.jsonl")
    return tmp_path


def saved(root, output, step=LAST):
    return checkpoint.read(root / output / "checkpoints" / f"step-{step}")


def tensors(root, output, step=LAST):
    return {name: tensor.read() for name, tensor in saved(root, output, step).tensors.items()}


def notes(root, output):
    lines = map(json.loads, (root / output / "metrics.jsonl").read_text().splitlines())
    return "\n".join(line["text"] for line in lines if line["kind"] == "note")


def interrupted(root, output, source="complete"):
    """A copy of a finished run that has only its checkpoint of step 5."""
    shutil.copytree(root / source, root / output)
    shutil.rmtree(root / output / "checkpoints" / f"step-{LAST}")
    (root / output / "metrics.jsonl").unlink()
    return root / output


def test_a_checkpoint_without_operators_resumes_bitwise_and_is_smaller_by_them(root):
    train(settings(root, "complete"))
    train(settings(root, "self-contained", self_contained=True))
    with_operators = tensors(root, "self-contained")
    operators = {name: value for name, value in with_operators.items() if ".osft." in name}
    assert operators and not [name for name in tensors(root, "complete") if ".osft." in name]
    assert_all_same(tensors(root, "complete"), {n: with_operators[n] for n in with_operators.keys() - operators.keys()})

    def data(output):
        path = root / output / "checkpoints" / f"step-{LAST}" / "rank-00000.safetensors"
        return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")

    assert data("self-contained") - data("complete") == sum(map(size, operators.values()))

    interrupted(root, "cut")
    train(settings(root, "cut"))
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))
    assert "resumes after step 5" in notes(root, "cut") and "computed again" not in notes(root, "cut")


def test_a_moved_run_folder_resumes_bitwise(root):
    train(settings(root, "complete"))
    interrupted(root, "cut").rename(root / "elsewhere")
    train(settings(root, "elsewhere"))
    assert_all_same(tensors(root, "elsewhere"), tensors(root, "complete"))
    assert "computed again" not in notes(root, "elsewhere")


def test_a_result_is_found_by_its_digest_under_any_library_version(root, monkeypatch):
    train(settings(root, "complete"))
    interrupted(root, "cut")
    before = sorted((root / "cut" / "prepared").iterdir())
    monkeypatch.setattr(results, "FORMAT", 99)  # as another torch would: today's keys name no result any more
    train(settings(root, "cut"))
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))
    assert sorted((root / "cut" / "prepared").iterdir()) == before


def test_missing_results_are_made_again_and_it_says_how_equal_they_are(root):
    train(settings(root, "complete"))
    shutil.rmtree(interrupted(root, "cut") / "prepared")
    train(settings(root, "cut"))
    assert "14 prepared results that" in notes(root, "cut") and "so this resume is bitwise" in notes(root, "cut")
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))


def test_results_with_other_bits_are_equal_to_rounding_and_named_by_later_checkpoints(root, monkeypatch):
    from treering.techniques.osft.protection import operators as protection

    train(settings(root, "complete"))
    shutil.rmtree(interrupted(root, "cut") / "prepared")
    exact = protection.eigen

    def other_library(moment):
        values, Q = exact(moment)
        return values, -Q * (1 + 1e-7)  # eigenvectors have no sign, and a library its own rounding

    monkeypatch.setattr(protection, "eigen", other_library)
    train(settings(root, "cut"))
    assert "equal to rounding, not bitwise" in notes(root, "cut")
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"), 1e-4)
    digests = saved(root, "cut").prepared
    assert digests and all(Prepared(root / "cut" / "prepared").find(digest) for digest in digests.values())
    assert digests != saved(root, "complete").prepared


def test_a_damaged_result_is_not_used(root):
    train(settings(root, "complete"))
    victim = sorted((interrupted(root, "cut") / "prepared").iterdir())[0]
    content = bytearray(victim.read_bytes())
    content[-2] ^= 1 << 6
    victim.write_bytes(content)
    train(settings(root, "cut"))
    assert "1 prepared results that" in notes(root, "cut") and "is damaged: " in notes(root, "cut")
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))


@pytest.mark.parametrize("where", ["in the model's folder", "statistics.path"])
def test_without_results_and_statistics_the_error_names_both(root, where):
    def cut():
        made = settings(root, "cut")
        path = str(root / "measured") if where == "statistics.path" else None
        return replace(made, statistics=StatisticsSection(path=path, tokens=0))

    if where == "statistics.path":
        (root / "model" / "statistics").rename(root / "measured")
    train(cut())
    shutil.rmtree(root / "cut" / "prepared")
    shutil.rmtree(root / ("measured" if where == "statistics.path" else "model/statistics"))
    with pytest.raises(tr.CheckpointError, match="trained with statistics") as error:
        train(cut())
    for text in ("step-8", "14 of its 14 prepared results are missing", "Put back a copy", "statistics.path"):
        assert text in str(error.value)


def test_results_are_not_made_again_from_other_weights(root):
    train(settings(root, "complete"))
    shutil.rmtree(interrupted(root, "cut") / "prepared")
    one = settings(root, "cut")
    forced = replace(one, train=replace(one.train, checkpoint=Checkpoint(force=True)), seed=1)
    with pytest.raises(tr.CheckpointError, match="cannot be computed again: this run has another seed"):
        train(forced)


def test_a_checkpoint_with_operators_opens_and_its_successors_stay_so(root):
    """What earlier versions wrote: format 2, everything inside."""
    train(settings(root, "complete", self_contained=True))
    folder = interrupted(root, "cut")
    shutil.rmtree(folder / "prepared")
    assert json.loads(json.loads((folder / "checkpoints/step-5/manifest.json").read_text())["content"])["format"] == 2
    train(settings(root, "cut"))
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))
    assert "computed again" not in notes(root, "cut") and not saved(root, "cut").prepared


def test_a_checkpoint_without_operators_is_continued_by_self_contained_ones(root):
    train(settings(root, "complete", self_contained=True))
    train(settings(root, "small"))
    interrupted(root, "cut", source="small")
    train(settings(root, "cut", self_contained=True))
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))


def test_a_manifest_with_a_digest_of_another_kind_is_refused(root):
    train(settings(root, "complete"))
    said = manifest.load(root / "complete" / "checkpoints" / "step-8")
    for digest in ("x", 3, "../" * 11):
        with pytest.raises(tr.CheckpointError, match="is not a manifest"):
            path = root / "bad"
            path.mkdir(exist_ok=True)
            (path / manifest.NAME).write_bytes(replace(said, prepared={"w": digest}).dump())
            manifest.load(path)


def test_an_export_needs_no_operators_and_a_live_run_has_them(root):
    done = settings(root, "complete")
    train(done)
    live = reopen(done).plan.live()
    shutil.rmtree(root / "complete" / "prepared")
    exported = export(done, root / "dense")
    assert not (root / "complete" / "prepared").exists()
    again = tr.compose(exported, [tr.Full()], dtype="float32")
    weights = dict(again.model.named_parameters())
    assert_all_same({name: weights[name] for name in weights}, {name: live[name] for name in weights})


def test_an_own_loop_is_told_where_the_rest_of_a_checkpoint_is(root):
    done = settings(root, "complete")
    train(done)
    found = saved(root, "complete")
    plan = tr.plan.draft(root / "model", done.techniques, dtype="float32", statistics=done_statistics(root))
    with pytest.raises(tr.CheckpointError, match=r"refill\.completed"):
        tr.plan.load(plan, resume=found.tensors)
    whole = completed(plan, found.tensors, found.prepared, root / "complete" / "prepared", checkpoint="step-8")
    assert set(whole) >= {name for names in unsaved(plan).values() for name in names}
    tr.plan.load(plan, resume=whole)


def done_statistics(root):
    from treering.curvature import open as open_statistics

    return open_statistics(root / "model" / "statistics")


def test_a_run_without_a_folder_for_results_saves_everything(root):
    from treering.train.checkpoints import state

    run = tr.compose(root / "model", [tr.OSFT(protect="weights")], dtype="float32")
    assert [name for name in state.tensors(run, []) if ".osft." in name]


def test_inspect_says_where_the_operators_are(root):
    train(settings(root, "complete"))
    step = root / "complete" / "checkpoints" / "step-8"
    assert describe(step).facts["prepared results"].startswith("14 in ")
    sorted((root / "complete" / "prepared").iterdir())[0].unlink()
    assert "1 missing" in describe(step).facts["prepared results"]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Holds a weight as a frozen parameter of its own, negated, which no checkpoint needs; trains a norm."""

    stage: ClassVar[Stage] = Stage.ADAPT
    name: ClassVar[str] = "model.layers.0.mlp.down_proj"

    def claims(self, anatomy, mesh):
        return [
            Claim(fqn=f"{self.name}.weight", aspect="storage"),
            Claim(fqn="model.norm.weight", aspect="gradient", needs=("plain_weight",)),
        ]

    def apply(self, model, site):
        module = model.get_submodule(self.name)
        packed = torch.nn.Parameter(torch.empty_like(module.weight))
        del module.weight
        module.register_parameter("packed", packed)
        module.forward = lambda x: x @ -module.packed.T
        name = f"{self.name}.packed"
        part = Part(
            names=(name,),
            split=lambda weight, below, statistics: {name: -weight.read()},
            join=lambda tensors, below: below - tensors[name],
            keeps_base=False,
            saved=False,
        )
        return Applied(trainable=("model.norm.weight",), parts={f"{self.name}.weight": part})


@pytest.mark.parametrize("prepared", ["there", "gone"])
def test_an_export_takes_a_frozen_base_from_its_result(root, prepared, caplog):
    done = replace(settings(root, "complete"), techniques=(Packed(),))
    train(done)
    assert set(saved(root, "complete").prepared) == {f"{Packed.name}.weight"}
    if prepared == "gone":
        shutil.rmtree(root / "complete" / "prepared")
    exported = load_file(export(done, root / "dense") / "model.safetensors")
    before = load_file(root / "model" / "model.safetensors")
    assert torch.equal(exported[f"{Packed.name}.weight"], before[f"{Packed.name}.weight"])
    assert not torch.equal(exported["model.norm.weight"], before["model.norm.weight"])
    assert ("computed again" in caplog.text) == (prepared == "gone")


def trained(root, output):
    train(settings(Path(root), output, techniques=(tr.Shard(),)))


@pytest.mark.parametrize(("ranks", "tolerance"), [(2, 0.0), (1, 1e-4)])
def test_two_ranks_leave_the_operators_to_results_and_any_number_resumes(root, ranks, tolerance):
    on_ranks(2, trained, root, "complete")
    assert saved(root, "complete").prepared
    interrupted(root, "cut")
    on_ranks(ranks, trained, root, "cut")
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"), tolerance)


def test_two_ranks_make_missing_results_again(root):
    on_ranks(2, trained, root, "complete")
    shutil.rmtree(interrupted(root, "cut") / "prepared")
    on_ranks(2, trained, root, "cut")
    assert "14 prepared results that" in notes(root, "cut")
    assert_all_same(tensors(root, "cut"), tensors(root, "complete"))
