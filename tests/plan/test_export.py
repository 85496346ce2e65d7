"""Exports: the same bytes whether a run is live, sharded or on disk; whole or not there; in the memory of a block."""

import ctypes
import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import treering as tr
from tests.ranks import RankFailed, on_ranks
from tests.test_memory import big, resident
from tests.toy import rows, train
from tests.toy_run import folder as toy_folder
from tests.toy_run import job as toy_job
from tests.zoo import build, save
from treering.plan import values as plan_values
from treering.plan.export import export as write
from treering.store import disk, publish
from treering.store.model_folder import tensor_files
from treering.store.tensor_writer import TensorWriter
from treering.train.export import export, reopen
from treering.train.run import train as train_job


def stored(folder):
    return {name: load_file(path)[name] for name, path in tensor_files(folder).items()}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_files(written, wanted):
    assert written.keys() == wanted.keys()
    assert not [name for name, content in wanted.items() if written[name] != content]


# --- live and streamed exports are the same bytes

TECHNIQUES = {
    "full": (tr.Full(),),
    "lora": (tr.LoRA(rank=2),),
    "pissa": (tr.LoRA(rank=2, init="pissa"),),
    "two": (tr.LoRA(rank=2, name="a"), tr.LoRA(rank=3, name="b", targets=("q_proj",), dtype="bfloat16")),
}


def values_from(run):
    """A checkpoint's view of `run`: what `refill` is given, and nothing else of it."""
    live = run.plan.live()
    return {name: _Held(live[name].detach().clone()) for name in run.plan.owned}


class _Held:
    def __init__(self, value):
        self.value = value

    def read(self):
        return self.value


@pytest.mark.parametrize("kind", TECHNIQUES)
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "phi3", "gemma3", "gpt2"])
def test_streaming_a_run_from_what_was_saved_gives_the_bytes_of_the_live_one(tmp_path, arch, kind):
    if kind != "full" and arch in ("phi3", "gpt2") and kind == "two":
        pytest.skip("has no q_proj")
    model = save(arch, tmp_path / "m")
    run = tr.compose(model, TECHNIQUES[kind])
    train(run, [rows(2)], lr=0.05)
    live = write(run.plan, tmp_path / "live", None, limit=20_000)
    drafted = tr.plan.draft(model, TECHNIQUES[kind])
    assert all(p.is_meta for p in drafted.model.parameters())
    streamed = write(
        drafted,
        tmp_path / "streamed",
        None,
        values=plan_values.saved_values(drafted, values_from(run)),
        limit=20_000,
    )
    assert_same_files(files(streamed), files(live))
    assert len(list(live.glob("*.safetensors"))) > 2
    plain = stored(model)
    assert stored(live).keys() == plain.keys()
    assert any(not torch.equal(value, plain[name]) for name, value in stored(live).items())


def test_a_tied_head_is_written_once(tmp_path):
    from transformers import AutoModelForCausalLM

    run = tr.compose(save("llama", tmp_path / "m", tied=True), [tr.Full()])
    out = run.export(tmp_path / "out")
    assert "lm_head.weight" not in tensor_files(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["full", "lora", "pissa"])
def test_a_run_on_disk_is_exported_as_the_live_one(tmp_path, kind):
    job = toy_job(tmp_path, techniques=TECHNIQUES[kind], train={"steps": 5})
    train_job(job)
    assert_same_files(files(export(job, tmp_path / "out")), files(reopen(job).export(tmp_path / "live")))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    if kind == "lora":
        streamed = export(job, tmp_path / "adapter", adapter="default")
        assert_same_files(files(streamed), files(reopen(job).export(tmp_path / "peft", adapter="default")))


def test_the_template_of_the_run_goes_with_its_model(tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}")
    job = toy_job(tmp_path, train={"steps": 1}, data={"template": str(tmp_path / "mine.jinja")})
    train_job(job)
    out = export(job, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == (tmp_path / "mine.jinja").read_text()


# --- whole or not there


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_taken_name_and_a_full_place_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    run = tr.compose(build("llama"), [tr.Full()])
    (tmp_path / "file").write_text("x")
    with pytest.raises(tr.CheckpointError, match="file is a file"):
        run.export(tmp_path / "file")
    with pytest.raises(tr.CheckpointError, match=r"is a file, so .* cannot be made"):
        run.export(tmp_path / "file" / "below")
    monkeypatch.setattr(publish, "free", lambda path: 3 << 20)
    with pytest.raises(tr.CheckpointError, match=r"out needs \d+ MiB and 3 MiB are free in "):
        run.export(tmp_path / "out")
    assert left(tmp_path) == ["file"]


def break_writing_at(monkeypatch, count):
    original = TensorWriter.add

    def add(self, name, tensor):
        if len(self.digests) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        original(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "add", add)


def test_a_disk_that_fills_up_leaves_nothing_and_says_what_was_needed(tmp_path, monkeypatch):
    run = tr.compose(build("llama"), [tr.Full()])
    break_writing_at(monkeypatch, 3)
    with pytest.raises(tr.CheckpointError, match=r"No space left.*needs \d+ MiB and [\d,]+ MiB are free"):
        run.export(tmp_path / "new" / "out")
    assert left(tmp_path / "new") == []


def fails_on_first(folder):
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard()])
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 0:
            break_writing_at(patch, 3)
        try:
            run.export(folder)
        except tr.CheckpointError as error:
            return str(error)


def test_what_fails_on_one_rank_is_said_by_all(tmp_path):
    errors = on_ranks(2, fails_on_first, tmp_path / "out")
    assert errors[0] == errors[1] and "on rank 0: No space left" in errors[0]
    assert left(tmp_path) == []


def test_values_that_transformers_refuses_end_the_export(tmp_path):
    model = build("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    run = tr.compose(model, [tr.Full()])
    with pytest.raises(tr.CheckpointError, match="temperature"):
        run.export(tmp_path / "out")
    assert left(tmp_path) == []


def killed(folder, point):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    add = TensorWriter.add
    if point == "writing":
        TensorWriter.add = lambda self, *a: die() if len(self.digests) == 6 else add(self, *a)
    else:
        publish.os.rename = die
    tr.compose(folder / "m", [tr.Full()]).export(folder / "out")


@pytest.mark.parametrize("point", ["writing", "renaming"])
def test_a_killed_export_leaves_nothing_that_loads_and_the_next_one_sweeps_it_up(tmp_path, point):
    save("llama", tmp_path / "m")
    with pytest.raises(RankFailed, match="exit code -9"):
        on_ranks(1, killed, tmp_path, point)
    assert not (tmp_path / "out").exists()
    (torn,) = tmp_path.glob("out.tmp-*")
    if point == "writing":
        assert left(torn) == ["model.safetensors"]
        with pytest.raises(tr.CheckpointError):
            tensor_files(torn)
    tr.compose(tmp_path / "m", [tr.Full()]).export(tmp_path / "out")
    assert left(tmp_path) == ["m", "out"]


def test_an_export_under_way_is_not_swept_up(tmp_path):
    next_one = disk.writing_in(tmp_path, publish.leftovers(tmp_path / "out"))
    with publish.published(tmp_path / "out", 0) as (temporary, _), next_one:
        assert temporary.is_dir()
    assert left(tmp_path) == ["out"]


# --- memory


def give_back_at_once():
    """What is freed goes back to the system: the measure is what is in use, not what the allocator keeps in store."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def peak_of_live_export(warm, folder, out):
    give_back_at_once()
    tr.compose(warm, [tr.LoRA(rank=4), tr.Shard()]).export(out / "warm-live")
    run = tr.compose(folder, [tr.LoRA(rank=4), tr.Shard()])
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    run.export(out / "live")
    return resident("VmHWM") - before


def peak_of_streaming(warm, folder, out):
    give_back_at_once()

    def once(model, to):
        run = tr.compose(model, [tr.LoRA(rank=4)])
        saved = values_from(run)
        del run
        plan = tr.plan.draft(model, [tr.LoRA(rank=4)])
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        write(plan, out / to, None, values=plan_values.saved_values(plan, saved))
        return resident("VmHWM") - before

    once(warm, "warm-streamed")
    return once(folder, "stream")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_an_export_takes_the_memory_of_one_block(tmp_path):
    whole, block = big(tmp_path / "m")
    warm = toy_folder(tmp_path / "warm")
    live = on_ranks(2, peak_of_live_export, warm, tmp_path / "m", tmp_path)
    (streamed,) = on_ranks(1, peak_of_streaming, warm, tmp_path / "m", tmp_path)
    peaks = [*live, streamed]
    assert max(peaks) <= 1.2 * block, f"{[round(p / block, 2) for p in peaks]} blocks"
    assert (tmp_path / "live" / "model.safetensors").stat().st_size > whole > 8 * block
