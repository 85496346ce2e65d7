"""What a folder is, from headers and JSON, with every length and name doubted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.cli.inspect import describe
from treering.core.errors import CheckpointError
from treering.store.untrusted import read_header
from treering.train.checkpoints.manifest import Manifest


def write(file, tensors, *, room=None):
    """A safetensors file of F32 tensors: name → shape."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        n = 4
        for s in shape:
            n *= s
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(at if room is None else room))


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4}))
    layers = {f"model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(2)}
    write(tmp_path / "model-1.safetensors", {"model.embed_tokens.weight": (16, 4)})
    write(tmp_path / "model-2.safetensors", layers)
    names = {"model.embed_tokens.weight": "model-1.safetensors", **dict.fromkeys(layers, "model-2.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_a_model_is_told_by_its_headers(model):
    report = describe(model)
    assert report.kind == "model"
    assert report.facts["model_type"] == "llama"
    assert report.facts["tensors"] == "3, 128 values"
    assert report.facts["size"] == "512 B F32"
    assert {(r.name, r.times, r.shape) for r in report.rows} == {
        ("model.embed_tokens.weight", 1, (16, 4)),
        ("model.layers.*.mlp.up_proj.weight", 2, (8, 4)),
    }
    assert report.warnings == []


def test_headers_agree_with_the_library(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(()),
        "c": torch.zeros(0, 4, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    headers = {h.name: (h.shape, h.bytes) for h in read_header(tmp_path / "x.safetensors")}
    assert headers == {n: (tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()}


def test_pickles_and_code_are_named_and_never_read(model):
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04not even pickle")
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    warnings = "\n".join(describe(model).warnings)
    assert "never read: pytorch_model.bin" in warnings
    assert "never run" in warnings


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "C:x", "a\\b"])
def test_an_index_cannot_point_out_of_its_folder(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="only plain names"):
        describe(model)


def test_a_file_that_the_index_promises_is_missed(model):
    (model / "model-2.safetensors").unlink()
    assert "model-2.safetensors, which is missing" in "\n".join(describe(model).warnings)


def test_a_pipe_is_not_waited_for(model):
    import os

    os.mkfifo(model / "model-3.safetensors")
    assert describe(model).kind == "model"


def test_a_file_that_was_cut_off_is_named(model):
    file = model / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors.*cut off"):
        describe(model)


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62] * 16, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_an_entry_that_is_no_tensor_is_refused(tmp_path, entry):
    raw = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        describe(tmp_path)


@settings(max_examples=60)
@given(st.binary(max_size=120), st.booleans())
def test_random_bytes_are_no_header(tmp_path_factory, data, framed):
    file = tmp_path_factory.mktemp("h") / "x.safetensors"
    file.write_bytes(len(data).to_bytes(8, "little") + data if framed else data)
    try:
        read_header(file)
    except CheckpointError as error:
        assert "x.safetensors" in str(error)


def test_an_adapter_a_checkpoint_and_a_run_are_told_apart(tmp_path):
    adapter, checkpoint, run = (tmp_path / n for n in ("adapter", "checkpoint", "run"))
    for folder in (adapter, checkpoint, run):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    write(adapter / "adapter_model.safetensors", {"q_proj.lora_A.weight": (8, 4)})
    manifest = Manifest(step=12, world=1, facts={}, files={}, tensors={})
    (checkpoint / "manifest.json").write_bytes(manifest.dump())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.25}\n')
    (run / "step-2").mkdir()
    (run / "step-2.tmp-1").mkdir()
    assert (describe(adapter).kind, describe(adapter).facts["r"]) == ("adapter", "8")
    assert (describe(checkpoint).kind, describe(checkpoint).facts["step"]) == ("checkpoint", "12")
    report = describe(run)
    assert (report.kind, report.facts["checkpoints"], report.facts["last loss"]) == ("run", "2", "3.25")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        describe(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="it is a file"):
        describe(tmp_path / "file")
    assert describe(tmp_path).kind == "folder"


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, "\xff"])
def test_a_config_that_is_not_json_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(tmp_path)
