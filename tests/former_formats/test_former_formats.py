"""Runs, exports and statistics of earlier versions: README.md says which, and by which script they were made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import treering as tr
from tests.former_formats.make import MEASURE, PROMPT, RESUMED_FROM, logits
from tests.same import assert_all_same, assert_same
from treering.cli import entry
from treering.curvature import open as open_statistics

WRITTEN = sorted(path.parent for path in Path(__file__).parent.glob("*/expected.safetensors"))


@pytest.fixture(params=WRITTEN, ids=lambda path: path.name)
def root(request, tmp_path, monkeypatch):
    """A copy of one folder, as the current directory: paths in it are relative."""
    shutil.copytree(request.param, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def treering(*arguments):
    assert entry.run(list(arguments)) == 0, f"treering {' '.join(arguments)} failed"


def expected(root, kind):
    tensors = load_file(root / "expected.safetensors")
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


def matrices(folder):
    return {weight: value["inputs"] for weight, value in open_statistics(folder).items()}


def resume(root, name):
    treering("train", f"{name}/config.yaml")
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line["after step"] for line in lines if line["kind"] == "start"]
    assert steps == [0, RESUMED_FROM], "the run began anew instead of resuming"


def test_an_osft_run_resumes_and_ends_where_it_ended(root):
    resume(root, "osft")
    treering("export", "osft", "--to", "dense")
    assert_all_same(load_file("dense/model.safetensors"), load_file("exports/dense/model.safetensors"), 1e-6)
    assert_all_same(matrices("dense/statistics"), matrices("exports/dense/statistics"), 1e-6)


def test_a_lora_run_resumes_and_ends_where_it_ended(root):
    resume(root, "lora")
    treering("export", "lora", "--to", "adapter", "--adapter", "default")
    file = "adapter_model.safetensors"
    assert_all_same(load_file(f"adapter/{file}"), load_file(f"exports/adapter/{file}"), 1e-6)
    new, old = (
        json.loads(Path(folder, "adapter_config.json").read_text()) for folder in ("adapter", "exports/adapter")
    )
    assert {key: new.get(key) for key in old} == old


@pytest.mark.parametrize("name", ["dense", "adapter"])
def test_an_export_computes_what_it_computed(root, name):
    assert_same(logits(root, name), expected(root, "logits")[name], 1e-6)


def test_an_exported_adapter_is_a_start(root):
    run = tr.compose("model", [tr.LoRA.from_peft("exports/adapter")], dtype="float32")
    with torch.no_grad():
        assert_same(run.model.eval()(PROMPT).logits, expected(root, "logits")["adapter"], 1e-6)


def test_statistics_hold_what_was_measured(root):
    assert_all_same(matrices("statistics"), expected(root, "statistics"))
    treering("measure", "model", "--to", "again", *MEASURE)
    assert_all_same(matrices("again"), expected(root, "statistics"), 1e-6)
