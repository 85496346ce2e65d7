"""The trainer at its borders: what is kept, what is refused in time, numbers that do not depend on the occasion."""

import errno
import json
import shutil
import time
from dataclasses import dataclass, replace

import pytest
import torch

import treering as tr
from tests.ranks import RankFailed, on_ranks
from tests.same import assert_all_same
from tests.toy_run import folder, job
from treering.store import disk
from treering.technique import Applied, Stage
from treering.train import train
from treering.train.callbacks import Callback, JsonLines
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints.manager import Progress
from treering.train.config import Checkpoint, Evaluate, Optimizer
from treering.train.export import export, reopen

HELD_OUT = {"eval_fraction": 0.2}


def told(root, kind, output="run"):
    lines = map(json.loads, (root / output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def notes(root, output="run"):
    return "\n".join(line["text"] for line in told(root, "note", output))


def steps(number, **more):
    return {"steps": number, "checkpoint": Checkpoint(every=1, keep=9), **more}


class Kept(Callback):
    def __init__(self):
        self.stepping, self.summaries, self.phases = [], [], []

    def stepped(self, metrics):
        self.stepping.append(metrics)

    def profiled(self, phases):
        assert not self.summaries
        self.phases.append(phases)

    def finished(self, summary):
        self.summaries.append(summary)


# What a user had is never lost


def test_a_refused_start_leaves_the_configuration_as_it_was(tmp_path):
    train(job(tmp_path, train=steps(2), written="seed: 0\n"))
    with pytest.raises(tr.CheckpointError, match="another seed"):
        train(job(tmp_path, train=steps(3), written="seed: 1\n", seed=1))
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"


def test_a_changed_configuration_is_kept_beside_the_new_one(tmp_path):
    train(job(tmp_path, train=steps(2), written="first\n"))
    train(job(tmp_path, train=steps(3), written="second\n"))
    train(job(tmp_path, train=steps(3), written="second\n"))
    found = {p.name: p.read_text() for p in (tmp_path / "run").glob("*.yaml")}
    assert found == {"config.yaml": "second\n", "config.until-step-2.yaml": "first\n"}


def test_pruning_counts_no_damaged_checkpoint_as_the_newest(tmp_path):
    for step in (1, 2, 3, 9):
        checkpoint.save(tmp_path, step, {"x": torch.ones(1)}, {})
    (tmp_path / "step-9" / "manifest.json").write_text("{")
    checkpoint.prune(tmp_path, keep=1, best=None, newest=3)
    assert {p.name for p in tmp_path.iterdir()} == {"step-3", "step-9"}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_unasked(tmp_path):
    train(job(tmp_path, train=steps(2)))
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(tr.CheckpointError, match="none of the 2 checkpoints"):
        train(job(tmp_path, train=steps(2)))


@pytest.mark.parametrize("point", ["rank 0: write", "rank 0: flush", "manifest: write", "publish: rename"])
def test_a_full_disk_is_an_explained_error_and_leaves_nothing(tmp_path, monkeypatch, point):
    def full(crossed):
        if crossed == point:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "crossing", full)
    with pytest.raises(tr.CheckpointError, match=r"rank 0: No space left.*checkpoints are untouched; .* are free"):
        checkpoint.save(tmp_path, 1, {"x": torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_vanishes_while_it_is_read_is_an_explained_error(tmp_path):
    saved = checkpoint.read(checkpoint.save(tmp_path, 1, {"x": torch.ones(1)}, {}))
    shutil.rmtree(saved.folder)
    with pytest.raises(tr.CheckpointError, match="cannot be read now"):
        saved.tensors["x"].read()


def on_a_file(root):
    (root / "run").write_text("mine")
    train(job(root, techniques=(tr.Full(), tr.Shard())))


@pytest.mark.parametrize("world", [1, 2])
def test_an_output_that_is_a_file_is_refused_on_every_rank(tmp_path, world):
    if world == 1:
        (tmp_path / "run").write_text("mine")
        with pytest.raises(tr.CheckpointError, match="output folder"):
            train(job(tmp_path))
    else:
        job(tmp_path)
        with pytest.raises(RankFailed, match="CheckpointError: making the output folder"):
            on_ranks(2, on_a_file, tmp_path)


# Going on


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    settings = {"evaluate": Evaluate(every=2, patience=1), "optimizer": Optimizer(lr=0.5), "log_every": 100}
    first = train(job(tmp_path, data=HELD_OUT, train=settings))
    again = train(job(tmp_path, data=HELD_OUT, train=settings))
    assert first["steps"] == again["steps"] == told(tmp_path, "step")[-1]["step"] < 12
    assert "nothing is left to do" in notes(tmp_path)


def test_metrics_tell_from_which_step_a_resumed_run_goes_on(tmp_path):
    train(job(tmp_path, train=steps(2)))
    train(job(tmp_path, train=steps(3)))
    assert [line["after step"] for line in told(tmp_path, "start")] == [0, 2]


def test_resuming_in_another_dtype_is_refused(tmp_path):
    first = job(tmp_path, train=steps(1))
    train(first)
    other = replace(first, model=replace(first.model, dtype="bfloat16"))
    with pytest.raises(tr.CheckpointError, match=r"another dtype: \['float32'\]"):
        train(other)
    with pytest.raises(tr.CheckpointError, match="another dtype"):
        reopen(other)


def test_exporting_with_other_techniques_is_refused(tmp_path):
    train(job(tmp_path, train=steps(1)))
    with pytest.raises(tr.CheckpointError, match="another techniques"):
        reopen(job(tmp_path, techniques=(tr.LoRA(rank=4),)))


def test_an_export_to_a_taken_place_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, found in (("file", "a file"), (".", "not empty")):
        with pytest.raises(tr.CheckpointError, match=found):
            export(job(tmp_path), tmp_path / place)


def test_a_best_loss_on_other_documents_is_no_measure(tmp_path):
    held = {"evaluate": Evaluate(every=1)}
    shutil.copy(job(tmp_path).data.train, tmp_path / "other.jsonl")
    train(job(tmp_path, data={"eval": str(tmp_path / "chat.jsonl")}, train=steps(2, **held)))
    (tmp_path / "other.jsonl").write_text("\n".join((tmp_path / "chat.jsonl").read_text().splitlines()[:3]))
    again = job(tmp_path, data={"eval": str(tmp_path / "other.jsonl")}, train=steps(2, **held))
    assert train(again)["best held-out loss"] is None


def test_a_held_out_loss_that_is_no_number_is_never_the_best():
    progress = Progress()
    for step, loss in enumerate([float("nan"), 2.0, float("nan"), 3.0], 1):
        progress.record_loss(step, loss)
    assert (progress.best, progress.best_step, progress.without_improvement) == (2.0, 2, 2)


@dataclass(frozen=True, kw_only=True)
class Counting:
    """A technique that keeps a number of its own."""

    stage = Stage.FORWARD

    def claims(self, anatomy, mesh):
        return []

    def apply(self, model, site):
        seen, whole = torch.zeros(2, 3), torch.zeros(())

        def after():
            seen.add_(1)
            whole.add_(1)

        return Applied(
            state=lambda: {"seen": seen, "whole": whole}, after_step=after, metrics=lambda: {"seen": float(seen[0, 0])}
        )


def test_what_a_technique_keeps_goes_on_too_and_is_told(tmp_path):
    both = (tr.Full(), Counting())
    train(job(tmp_path, techniques=both, train=steps(2)))
    train(job(tmp_path, techniques=both, train=steps(3)))
    assert [line["seen"] for line in told(tmp_path, "step")] == [1, 2, 3]
    saved = checkpoint.read(tmp_path / "run" / "checkpoints" / "step-3").tensors
    assert_all_same({"whole": saved["state/whole"].read()}, {"whole": torch.tensor(3.0)})


# Numbers


def test_tokens_are_those_of_documents_whatever_the_padding(tmp_path, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr("treering.train.reporter.time.monotonic", lambda: float(next(seconds)))
    kept = Kept(), Kept()
    for packing, callback in zip(("on", "off"), kept):
        data = {"packing": packing, "shuffle": False}
        train(job(tmp_path, packing, data=data, train={"steps": None, "epochs": 1.0}), [callback])
    on, off = (sum(m["tokens_per_second"] for m in callback.stepping) for callback in kept)
    assert on == off == sum(len(line) for line in documents(tmp_path))


def documents(root):
    from treering.data.examples import build
    from treering.train.prepare import open_tokenizer

    one = job(root)
    examples = build(one.data, open_tokenizer(one), "train")
    return [examples.document(i).ids for i in range(len(examples))]


def test_a_profile_adds_up_and_a_run_is_finished_once(tmp_path, monkeypatch):
    for clock in ("monotonic", "perf_counter"):  # of this process alone: others may keep it from running in between
        monkeypatch.setattr(f"treering.train.reporter.time.{clock}", time.process_time)
    kept = Kept()
    settings = steps(3, evaluate=Evaluate(every=1, prompts=("say 3",), new_tokens=8))
    summary = train(job(tmp_path, train=settings), [kept], profile=True)
    assert len(kept.summaries) == len(kept.phases) == 1
    timed = sum(row["ms a step"] for row in kept.phases[0]) * 3 / 1000
    assert "samples" in {row["phase"] for row in kept.phases[0]} and timed > 0.8 * summary["seconds"] - 0.1


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path):
    JsonLines(tmp_path / "m").stepped({"step": 1, "loss": float("nan"), "norm": float("inf")})
    assert json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail) == {
        "kind": "step", "step": 1, "loss": None, "norm": None
    }  # fmt: skip


def overheated(root):
    hot = {"optimizer": Optimizer(name="sgd", lr=1e30), "max_skips": 2}
    try:
        train(job(root, techniques=(tr.Full(), tr.Shard()), train=hot))
    except tr.NumericsError as error:
        return str(error)


def test_every_rank_names_the_samples_of_all(tmp_path):
    job(tmp_path)
    first, second = on_ranks(2, overheated, tmp_path)
    assert first == second and "chat.jsonl:" in first
    skipped = [n["text"] for n in told(tmp_path, "note") if "skipped" in n["text"]]
    assert len(skipped) == 1 and skipped[0].count("chat.jsonl:") > 1


def test_a_step_that_cannot_be_what_was_asked_says_so(tmp_path):
    train(job(tmp_path, train=steps(1, tokens_per_step=300)))
    assert "tokens_per_step 300 is no multiple of data.max_length 128: a step has 2 × 128 = 256" in notes(tmp_path)


# Does the data fit the model?


def small(tmp_path, **changes):
    one = job(tmp_path, train=steps(1))
    return replace(one, model=replace(one.model, path=str(folder(tmp_path / "small", **changes))))


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_sample(tmp_path):
    one = small(tmp_path, vocab_size=257, eos_token_id=None)
    with pytest.raises(tr.PlanError, match=r"chat\.jsonl:1 has token 257 .*257 rows.*resize_token_embeddings\(258\)"):
        train(one)
    assert not (tmp_path / "run" / "checkpoints").exists()


def gpt2(path, positions):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder(path)
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).save_pretrained(path)
    return str(path)


def test_documents_beyond_learned_positions_are_refused_by_sample(tmp_path):
    one = job(tmp_path, train=steps(1))
    with pytest.raises(tr.PlanError, match=r"chat\.jsonl:\d+ has \d+ tokens.*has 32 positions; set data\.max_length"):
        train(replace(one, model=replace(one.model, path=gpt2(tmp_path / "gpt2", 32))))
    prompted = replace(one, train=replace(one.train, evaluate=Evaluate(prompts=("x" * 200,))))
    with pytest.raises(tr.PlanError, match=r"prompts\[0\] has \d+ tokens and 64 follow it.*shorten it"):
        train(replace(prompted, model=replace(one.model, path=gpt2(tmp_path / "more", 256))))


def test_documents_beyond_what_rotary_positions_were_made_for_are_told(tmp_path):
    train(small(tmp_path, max_position_embeddings=32))
    assert "has 32 positions" in notes(tmp_path)


def test_an_empty_prompt_is_refused_before_training(tmp_path):
    lines = [json.dumps({"text": f"ring number {i}"}) for i in range(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    one = job(tmp_path, data={"train": str(tmp_path / "text.jsonl")}, train=steps(1, evaluate=Evaluate(prompts=("",))))
    with pytest.raises(tr.PlanError, match=r"prompts\[0\] has no token"):
        train(one)


def test_prompts_are_written_as_what_is_trained_on(tmp_path):
    from treering.train.evaluate import encode
    from treering.train.prepare import open_data, open_tokenizer
    from treering.train.run import draft_of

    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "ring tree bark"}))
    for data, wanted in (
        ({}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ({"template": str(tmp_path / "own.jinja")}, "[user]hi"),
        ({"train": str(tmp_path / "text.jsonl")}, "hi"),
    ):
        one = job(tmp_path, data=data)
        tokenizer = open_tokenizer(one)
        template = open_data(one, tokenizer, draft_of(one)).template
        assert tokenizer.decode(encode(tokenizer, "hi", template)[0]) == wanted


def test_training_in_float16_is_refused_and_in_bfloat16_told(tmp_path):
    one = job(tmp_path, train=steps(1))
    train(replace(one, model=replace(one.model, dtype="bfloat16")))
    assert "trained parameters are bfloat16" in notes(tmp_path)
    half = tmp_path / "model" / "config.json"
    half.write_text(half.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    with pytest.raises(tr.PlanError, match="trained in float16"):
        train(replace(one, model=replace(one.model, dtype="auto"), output=str(tmp_path / "half")))


# Few documents, many ranks


def few(root, world):
    lines = (root / "chat.jsonl").read_text().splitlines()
    (root / "one.jsonl").write_text(lines[0])
    data = {"train": str(root / "one.jsonl"), "eval": str(root / "one.jsonl")}
    techniques = (tr.Full(), tr.Shard()) if world > 1 else (tr.Full(),)
    train(job(root, f"on-{world}", techniques=techniques, data=data, train=steps(7, tokens_per_step=128)))


def test_one_document_over_many_epochs_on_more_ranks_than_bins(tmp_path):
    job(tmp_path)
    few(tmp_path, 1)
    on_ranks(3, few, tmp_path, 3)
    for kind, value in (("step", "loss"), ("evaluation", "held_out_loss")):
        one, three = ([line[value] for line in told(tmp_path, kind, f"on-{n}")] for n in (1, 3))
        assert three == pytest.approx(one, rel=1e-5) and one
    assert "do not divide by 3 ranks" in notes(tmp_path, "on-3")


# The demo


def test_the_demo_takes_a_folder_of_any_name_and_no_file(tmp_path):
    from treering.cli.config import load
    from treering.demo import acts
    from treering.demo import run as demo

    root = tmp_path / 'my, "own": #1 {demo}'
    root.mkdir()
    stage = acts.DemoStage(root=root, note=print, train=print, export=print, measure=print, table=print)
    config = load(acts.write_config(stage, "pretrain.yaml", acts.PRETRAIN, steps=3), None)
    assert config.model.path == f"{root}/blank" and config.data.eval == f"{root}/corpus/held_out.jsonl"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(tr.TreeringError, match="is a file"):
        demo(tmp_path / "file", None)
