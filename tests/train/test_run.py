"""The trainer end to end at toy size: it learns, resumes bitwise, evaluates, stops, exports."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy_run import job
from treering.store import disk
from treering.train import train
from treering.train.callbacks import Callback
from treering.train.checkpoints.files import read
from treering.train.config import Checkpoint, Evaluate, Optimizer
from treering.train.export import reopen
from treering.train.optimizers import rate


def losses(root, output="run"):
    lines = (root / output / "metrics.jsonl").read_text().splitlines()
    return {m["step"]: m["loss"] for m in map(json.loads, lines) if m["kind"] == "step"}


def tensors(root, output="run", step=12):
    return {n: t.read() for n, t in read(root / output / "checkpoints" / f"step-{step}").tensors.items()}


def test_it_learns_and_tells(tmp_path):
    summary = train(job(tmp_path, written="model: toy\n"))
    told = losses(tmp_path)
    assert list(told) == list(range(1, 13)) and told[12] < told[1] - 1
    assert summary["steps"] == 12 and summary["skipped"] == 0
    assert (tmp_path / "run" / "config.yaml").read_text() == "model: toy\n"


def test_tensors_that_the_model_has_no_place_for_are_noted_once(tmp_path):
    from safetensors.torch import load_file, save_file

    made = job(tmp_path, train={"steps": 2})
    file = tmp_path / "model" / "model.safetensors"
    visual = {f"model.visual.blocks.{i}.weight": torch.ones(2) for i in range(9)}
    save_file(load_file(file) | visual, file, metadata={"format": "pt"})
    train(made)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    [text] = [m["text"] for m in lines if m["kind"] == "note" and "no place" in m["text"]]
    assert "9 of the folder's tensors" in text and "model.visual.blocks.*.weight (9)" in text


def test_a_flipped_bit_of_a_prepared_result_does_not_reach_training(tmp_path):
    technique = (tr.OSFT(protect="weights", form="factors"),)
    settings = {"steps": 2, "checkpoint": Checkpoint(every=None)}
    train(job(tmp_path, "whole", techniques=technique, train=settings))
    shutil.copytree(tmp_path / "whole" / "prepared", tmp_path / "cut" / "prepared")
    for path in (tmp_path / "cut" / "prepared").iterdir():
        content = bytearray(path.read_bytes())
        content[-2] ^= 1 << 6
        path.write_bytes(content)
    train(job(tmp_path, "cut", techniques=technique, train=settings))
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    assert "prepared results had to be computed again" in (tmp_path / "cut" / "metrics.jsonl").read_text()


class Stop(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def stepped(self, metrics):
        if metrics["step"] == self.step:
            raise Stop


@pytest.mark.parametrize(
    "techniques",
    [(tr.Full(),), (tr.LoRA(rank=4, init="pissa"),)],
    ids=["full", "pissa"],
)
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, techniques, stop):
    settings = {"checkpoint": Checkpoint(every=1, keep=20)}
    train(job(tmp_path, "whole", techniques=techniques, train=settings))
    cut = job(tmp_path, "cut", techniques=techniques, train=settings)

    with pytest.raises(Stop):
        train(cut, [StopAfter(stop + 1)])
    train(cut)
    assert_all_same(tensors(tmp_path, "cut"), tensors(tmp_path, "whole"))
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")


def interrupted(root, output, stop):
    """Two ranks; stopped after `stop` steps if given, by an exception on both at once."""

    def one():
        return job(root, output, techniques=(tr.Full(), tr.Shard()), train={"checkpoint": Checkpoint(every=2, keep=20)})

    if stop is not None:
        cut = replace(one(), train=replace(one().train, steps=stop))
        with pytest.MonkeyPatch.context() as patch:
            # The schedule of a run that was to be longer: what a killed process leaves behind.
            from treering.train import optimizers

            patch.setattr(optimizers, "rate", lambda schedule, step, steps: rate(schedule, step, 12))
            train(cut)
    train(one())


def test_two_ranks_resume_bitwise(tmp_path):
    on_ranks(2, interrupted, tmp_path, "whole", None)
    on_ranks(2, interrupted, tmp_path, "cut", 6)
    assert_all_same(tensors(tmp_path, "cut"), tensors(tmp_path, "whole"))


@pytest.mark.parametrize("world", [1, 2])
def test_saving_beside_training_writes_the_same(tmp_path, world):
    on_ranks(world, beside, tmp_path, False)
    on_ranks(world, beside, tmp_path, True)
    for step in (2, 4, 12):
        assert_all_same(tensors(tmp_path, "beside True", step), tensors(tmp_path, "beside False", step))


def beside(root, asynchronous):
    saving = Checkpoint(every=2, keep=20, asynchronous=asynchronous)
    train(job(root, f"beside {asynchronous}", techniques=(tr.Full(), tr.Shard()), train={"checkpoint": saving}))


def test_an_error_of_a_save_beside_training_is_heard(tmp_path, monkeypatch):
    def full(crossed):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "crossing", full)
    with pytest.raises(tr.CheckpointError, match="No space left"):
        train(job(tmp_path, train={"checkpoint": Checkpoint(every=2, asynchronous=True)}))


def test_force_goes_on_with_other_data_but_not_with_other_tensors(tmp_path):
    train(job(tmp_path))
    forced = {"checkpoint": Checkpoint(force=True), "steps": 13}
    train(job(tmp_path, seed=1, train=forced))
    assert "forced: " in (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(tr.CheckpointError, match="another techniques"):
        train(job(tmp_path, techniques=(tr.LoRA(rank=2),), train=forced))


def test_the_best_evaluation_is_saved_where_asked(tmp_path):
    settings = {"evaluate": Evaluate(every=3), "checkpoint": Checkpoint(every=100, keep=1, best=True)}
    train(job(tmp_path, data={"eval_fraction": 0.2}, train=settings | {"optimizer": Optimizer(lr=0.3)}))
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = {m["step"]: m["held_out_loss"] for m in told if m["kind"] == "evaluation"}
    best = int(min(held_out, key=held_out.get))
    assert (tmp_path / "run" / "checkpoints" / f"step-{best}").is_dir()


def test_steps_that_are_not_finite_name_their_samples(tmp_path):
    hot = {"optimizer": Optimizer(name="sgd", lr=1e30), "max_skips": 2}
    with pytest.raises(tr.NumericsError, match=r"chat\.jsonl:\d+"):
        train(job(tmp_path, train=hot))


def trained(root, output, world):
    train(job(root, output, techniques=(tr.LoRA(rank=4), tr.Shard()) if world > 1 else (tr.LoRA(rank=4),)))


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_losses_on_several_ranks(tmp_path, world):
    trained(tmp_path, "one", 1)
    on_ranks(world, trained, tmp_path, "many", world)
    one, many = losses(tmp_path, "one"), losses(tmp_path, "many")
    assert many == pytest.approx(one, rel=1e-5)


def test_a_checkpoint_of_two_ranks_is_gone_on_with_by_one(tmp_path):
    on_ranks(2, trained, tmp_path, "run", 2)
    run = reopen(job(tmp_path, techniques=(tr.LoRA(rank=4),)))
    live = dict(run.model.named_parameters())
    assert_all_same({n: live[n] for n in run.plan.owned}, {n: tensors(tmp_path)[n] for n in run.plan.owned})


def test_another_seed_or_budget_is_refused_with_both_values(tmp_path):
    first = job(tmp_path)
    train(first)
    with pytest.raises(tr.CheckpointError, match="another seed: 0, and this run has 1"):
        train(replace(first, seed=1))
    with pytest.raises(tr.CheckpointError, match="another tokens_per_step: 256, and this run has 128"):
        train(job(tmp_path, train={"tokens_per_step": 128}))


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path):
    train(job(tmp_path))
    with pytest.raises(tr.CheckpointError, match="another output folder"):
        train(job(tmp_path, train={"checkpoint": Checkpoint(resume="never")}))


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path):
    train(job(tmp_path))
    target = tmp_path / "run" / "checkpoints" / "step-12" / "rank-00000.safetensors"
    content = bytearray(target.read_bytes())
    content[-5] ^= 1
    target.write_bytes(content)
    train(job(tmp_path))
    told = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "passed over" in told and "resumes after step 10" in told


def test_evaluation_best_checkpoint_and_early_stop(tmp_path):
    evaluate = Evaluate(every=2, patience=2, prompts=("say 3",), new_tokens=4)
    hot = {"evaluate": evaluate, "optimizer": Optimizer(lr=0.5), "checkpoint": Checkpoint(every=2, keep=1)}
    summary = train(job(tmp_path, data={"eval_fraction": 0.2}, train=hot))
    assert summary["steps"] < 12
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 2  # the newest and the best
    told = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "held_out_loss" in told and "stopped early" in told and "say 3" in told


def evaluated(root, output, world):
    from treering.train.config import Evaluate

    techniques = (tr.Full(), tr.Shard()) if world > 1 else (tr.Full(),)
    train(job(root, output, techniques=techniques, data={"eval_fraction": 0.3}, train={"evaluate": Evaluate(every=6)}))


def test_held_out_loss_is_the_same_on_several_ranks(tmp_path):
    def held_out(output):
        lines = map(json.loads, (tmp_path / output / "metrics.jsonl").read_text().splitlines())
        return [m["held_out_loss"] for m in lines if m["kind"] == "evaluation"]

    evaluated(tmp_path, "one", 1)
    on_ranks(3, evaluated, tmp_path, "three", 3)
    assert held_out("three") == pytest.approx(held_out("one"), rel=1e-5) and len(held_out("one")) == 2


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_other_optimizers_learn_and_resume(tmp_path, name):
    settings = {"optimizer": Optimizer(name=name, lr=0.02 if name == "muon" else 0.5, momentum=0.9)}
    train(job(tmp_path, "whole", train=settings))
    train(job(tmp_path, "part", train=settings | {"checkpoint": Checkpoint(every=5, keep=9)}))
    import shutil

    for step in (12, 10):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{step}")
    train(job(tmp_path, "part", train=settings | {"checkpoint": Checkpoint(every=5, keep=9)}))
    assert_all_same(tensors(tmp_path, "part"), tensors(tmp_path, "whole"))


def test_muon_over_sharded_matrices_is_refused(tmp_path):
    from tests.ranks import RankFailed

    job(tmp_path)  # makes the toy folder, which the ranks share
    with pytest.raises(RankFailed, match="muon orthogonalises complete matrices"):
        on_ranks(2, muon_on_ranks, tmp_path)


def muon_on_ranks(root):
    train(job(root, techniques=(tr.Full(), tr.Shard()), train={"optimizer": Optimizer(name="muon")}))


def test_a_run_is_exported_and_loads_with_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = job(tmp_path, techniques=(tr.LoRA(rank=4),))
    train(done)
    run = reopen(done)
    run.export(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    ids = tokenizer("ring tree", return_tensors="pt")["input_ids"]
    run.model.eval()
    with torch.no_grad():
        found, wanted = model(ids).logits, run.model(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5) and tokenizer.chat_template
