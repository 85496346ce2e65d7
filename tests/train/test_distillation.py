"""Distillation from a configuration: what a run reports, how it resumes, and which teachers are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import treering as tr
from tests.same import assert_all_same
from tests.toy_run import folder, job
from treering.cli.parsing import read_file, validate
from treering.cli.schema import RunConfig
from treering.cli.train import job_of
from treering.train import train
from treering.train.checkpoints.files import read
from treering.train.config import Checkpoint, Evaluate, Job
from treering.train.export import export

STEPS = {"steps": 4, "checkpoint": Checkpoint(every=2, keep=5), "evaluate": Evaluate(every=2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("distillation")
    folder(root / "model")
    folder(root / "teacher", hidden_size=64, num_hidden_layers=3)
    return root


def distilled(root: Path, output: str, teacher: Path | str, **changes: Any) -> Job:
    objective = tr.Distill(teacher=str(teacher), temperature=2.0, mix=0.1)
    techniques = (tr.LoRA(rank=4), tr.TiledLoss(tile=50))
    data = {"eval_fraction": 0.2}
    return job(root, output, techniques=techniques, objective=objective, data=data, train=STEPS | changes)


def tensors(root: Path, output: str, step: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor.read() for name, tensor in read(root / output / "checkpoints" / f"step-{step}").tensors.items()
    }


def test_a_run_reports_what_it_distilled_and_resumes_bit_for_bit(root):
    train(distilled(root, "whole", root / "teacher"))
    lines = [json.loads(line) for line in (root / "whole" / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in reports] == [2, 4]
    for line in reports:
        assert 0 < line["kl"] < 1 and 0 <= line["agreement"] <= 1 and line["perplexity"] > 1

    shutil.copytree(root / "whole", root / "halves")
    shutil.rmtree(root / "halves" / "checkpoints" / "step-4")
    shutil.move(root / "teacher", root / "moved")  # the same weights in another place
    try:
        train(distilled(root, "halves", root / "moved"))
    finally:
        shutil.move(root / "moved", root / "teacher")
    halves, whole = (tensors(root, output, 4) for output in ("halves", "whole"))
    assert_all_same(halves, whole)
    assert len([name for name in whole if name.endswith((".A", ".B"))]) == 28 and not any("embed" in n for n in whole)


def test_another_teacher_or_objective_does_not_resume_the_run(root):
    first = distilled(root, "changed", root / "teacher", steps=1)
    train(first)
    folder(root / "other", hidden_size=48)
    longer = replace(first, train=replace(first.train, steps=2))
    other = tr.Distill(teacher=str(root / "other"), temperature=2.0, mix=0.1)
    for changed, name in ((other, "teacher"), (replace(other, mix=0.5), "objective"), (None, "objective")):
        with pytest.raises(tr.CheckpointError, match=f"was made with another {name}: .*--force resumes"):
            train(replace(longer, objective=changed))
    forced = replace(longer.train, checkpoint=Checkpoint(force=True))
    assert train(replace(longer, objective=other, train=forced))["steps"] == 2


def test_an_export_does_not_need_the_teacher(root):
    gone = folder(root / "gone", hidden_size=64)
    written = distilled(root, "written", gone, steps=1)
    train(written)
    shutil.rmtree(gone)
    assert (export(written, root / "exported") / "config.json").is_file()


def test_a_teacher_whose_tokenizer_gives_other_ids_is_refused(root):
    other = folder(root / "swapped")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(tr.PlanError, match=r"2 tokens differ, such as 'a', which is id \d+ in .*/model and id \d+ in"):
        train(distilled(root, "refused", other))


def test_a_teacher_without_a_tokenizer_is_noted(root):
    bare = folder(root / "bare", hidden_size=64)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    train(distilled(root, "noted", bare, steps=1))
    assert "not both have a tokenizer" in (root / "noted" / "metrics.jsonl").read_text()


WRITTEN = {
    "distill: base": tr.Distill(teacher="base"),
    "distill: {teacher: TEACHER, temperature: 2, mix: 0.25, divergence: reverse}": tr.Distill(
        teacher="TEACHER", temperature=2.0, mix=0.25, divergence="reverse"
    ),
    "": None,
}


@pytest.mark.parametrize("text", WRITTEN)
def test_the_objective_is_a_section_of_the_file(text, root, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {root / 'model'}\ndata: x.jsonl\ntechniques: {{lora: }}\noutput: out\nobjective: {{{text}}}\n"
    )
    assert job_of(validate(RunConfig, read_file(file))).objective == WRITTEN[text]


@pytest.mark.parametrize(
    ("field", "value"), [("mix", 1.0), ("mix", -0.1), ("temperature", 0), ("divergence", "both"), ("teacher", " ")]
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(tr.ConfigError) as caught:
        tr.Distill(**{"teacher": "base", field: value})
    assert caught.value.field == field
