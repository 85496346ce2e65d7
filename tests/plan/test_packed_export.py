"""Quantized weights are written as published folders hold them, and such a folder opens again bit for bit."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import treering as tr
from tests.ranks import on_ranks
from tests.skips import sharded_codes
from tests.toy import rows, train
from tests.weights import folders, layouts
from treering import formats
from treering.core.errors import PlanError
from treering.core.sharded import gather
from treering.plan.packed_export import requantized
from treering.plan.values import live_values
from treering.weights.quantized.layouts import CompressedTensors

IDS = torch.arange(3, 23)[None]
FORMATS = {
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "group": 32},
    "int3": {"format": "int3", "group": 32},
    "fp8": {"format": "fp8"},
    "fp8_block": {"format": "fp8_block"},
    "nf4": {"format": "nf4"},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
}
LORA = tr.LoRA(rank=2, targets=("q_proj", "o_proj"))


def saved(arch, path, dtype=torch.bfloat16):
    folders.wide(arch, dtype=dtype).save_pretrained(path)
    return path


def codes(run):
    """Codes and scales by name; one global scale of nvfp4 for all parts that have the same."""
    tensors = {name: gather(p).detach().clone() for name, p in run.model.named_parameters() if p.dtype == torch.uint8}
    for name, t in tensors.items():
        if name.endswith(".global") and bool((t == t[..., :1, :]).all()):
            tensors[name] = t[..., :1, :]
    return tensors


def logits(run):
    with torch.no_grad():
        return run.model(input_ids=IDS).logits


def assert_same_codes(found, wanted):
    assert found.keys() == wanted.keys() and found
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_folder_opens_again_with_the_same_bits(arch, settings, tmp_path):
    run = tr.compose(saved(arch, tmp_path / "m"), [tr.Quantize(**settings)], frozen=True)
    if (arch, settings["format"]) == ("mixtral", "nf4"):
        with pytest.raises(PlanError, match="inside a block of nf4's nested scales"):
            run.export(tmp_path / "q", packed=True)
        return
    run.export(tmp_path / "q", packed=True)
    again = tr.compose(tmp_path / "q", [], frozen=True)
    assert_same_codes(codes(again), codes(run))
    assert torch.equal(logits(again), logits(run))
    for name, value in run.plain():
        assert torch.equal(value, dict(again.plain([name]))[name]), name


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int8", "int3", "fp8", "fp8_block", "nf4"])
def test_the_tensors_are_those_that_the_library_writes(name, tmp_path):
    """Against writers that were made from the description of each layout."""
    folder = saved("llama", tmp_path / "m")
    run = tr.compose(folder, [tr.Quantize(**FORMATS[name])], frozen=True)
    run.export(tmp_path / "q", packed=True)
    written, plain = load_file(tmp_path / "q/model.safetensors"), load_file(folder / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    form, W = run.model.get_submodule(module).packed.form, plain[f"{module}.weight"]
    others = {"nf4": layouts.bitsandbytes, "fp8_block": layouts.deepseek}
    described, tensors = others.get(name, lambda *what: layouts.compressed_tensors(*what, form))(module, W)
    assert {key for key in written if key.startswith(f"{module}.")} == tensors.keys()
    for key, value in tensors.items():
        if key.endswith("bitsandbytes__nf4"):  # filled up with spaces
            states = [json.loads(bytes(t.tolist())) for t in (written[key], value)]
            assert states[0] | {"dtype": "float32"} == states[1] and states[0]["dtype"] == "bfloat16"
            continue
        assert written[key].dtype == value.dtype and written[key].flatten().shape == value.flatten().shape, key
        assert torch.equal(written[key].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), key
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == described["quant_method"]
    if name == "fp8_block":
        assert {key: config[key] for key in described} == described
    elif name != "nf4":
        asked = described["config_groups"]["group_0"]["weights"]
        found = config["config_groups"]["group_0"]["weights"]
        assert {key: found.get(key) for key in asked} == asked and config["ignore"] == ["lm_head"]


def test_gpt_oss_is_written_as_openai_publishes_it(tmp_path):
    experts = ("gate_up_proj", "down_proj")
    run = tr.compose(saved("gpt_oss", tmp_path / "m"), [tr.Quantize(format="mxfp4", targets=experts)], frozen=True)
    run.export(tmp_path / "q", packed=True)
    again = tr.compose(tmp_path / "q", [], frozen=True)
    assert_same_codes(codes(again), codes(run))
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "model.layers.0.self_attn.q_proj" in config["modules_to_not_convert"]
    everything = tr.compose(tmp_path / "m", [tr.Quantize(format="mxfp4")], frozen=True)
    with pytest.raises(PlanError, match="published with quantized experts only"):
        everything.export(tmp_path / "x", packed=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("writer", ["nvfp4", "w4a16 asymmetric", "fp8 tensor", "deepseek", "bitsandbytes plain"])
def test_what_a_folder_stores_is_written_with_its_bits(writer, tmp_path):
    folder = folders.published("qwen3_moe", tmp_path / "m", folders.WRITERS[writer])
    run = tr.compose(folder, [LORA])
    train(run, [rows(1)])
    run.export(tmp_path / "q", packed=True, adapter="default")
    again = tr.compose(tmp_path / "q", [], frozen=True)
    assert_same_codes(codes(again), codes(run))
    with run.without():
        assert torch.equal(logits(again), logits(run))


@pytest.mark.parametrize(
    ("writer", "reason"),
    [("modelopt nvfp4", "its global scale multiplies"), ("bitsandbytes", "nested scales|dense model")],
)
def test_what_no_layout_holds_is_refused(writer, reason, tmp_path):
    folder = folders.published("llama", tmp_path / "m", folders.WRITERS[writer])
    run = tr.compose(folder, [], frozen=True)
    if writer == "bitsandbytes":  # of a dense model it can be written
        run.export(tmp_path / "q", packed=True)
        assert_same_codes(codes(tr.compose(tmp_path / "q", [], frozen=True)), codes(run))
        return
    with pytest.raises(PlanError, match=reason):
        run.export(tmp_path / "q", packed=True)


def test_an_adapter_is_written_next_to_the_weights_that_it_was_trained_on(tmp_path):
    techniques = [tr.Quantize(format="nvfp4"), tr.LoRA(rank=2, init="residual")]
    run = tr.compose(saved("llama", tmp_path / "m"), techniques)
    train(run, [rows(2)])
    with pytest.raises(PlanError, match="export the dense model instead"):
        run.export(tmp_path / "alone", adapter="default")
    run.export(tmp_path / "q", adapter="default", packed=True)
    described = json.loads((tmp_path / "q/adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "q")
    again = tr.compose(tmp_path / "q", [tr.LoRA.from_peft(tmp_path / "q/adapter")])
    assert torch.equal(logits(again), logits(run))


def test_merging_into_codes_is_refused_with_what_it_would_lose(tmp_path):
    run = tr.compose(saved("llama", tmp_path / "m", torch.float32), [tr.Quantize(format="int3", group=32), LORA])
    train(run, [rows(2, seed=i) for i in range(3)], lr=0.1)
    name = "model.layers.0.self_attn.q_proj.weight"
    error, change, kept = requantized(run.plan, name, live_values(run.plan))
    module = run.model.get_submodule(name.removesuffix(".weight"))
    form = module.packed.form
    Q = form.decode({k: getattr(module.packed, k) for k in module.packed.keys}, 64, torch.float32)
    D = (module.lora_default.B @ module.lora_default.A).detach()
    again = form.decode(form.encode(Q + D), 64, torch.float32)
    assert error == pytest.approx(float((again - Q - D).norm() / Q.norm()), rel=1e-4)
    assert change == pytest.approx(float(D.norm() / Q.norm()), rel=1e-4) and change > 0
    assert kept == pytest.approx(float(((again - Q) * D).sum() / D.square().sum()), rel=1e-3)
    with pytest.raises(PlanError) as caught:
        run.export(tmp_path / "q", packed=True)
    assert re.search(
        r"4 quantized weights have adapters.* \d+% of it would remain .*--adapter default", str(caught.value)
    )
    assert not (tmp_path / "q").exists()
    run.export(tmp_path / "dense")


def test_without_quantized_weights_there_is_nothing_to_write(tmp_path):
    run = tr.compose(saved("llama", tmp_path / "m"), [LORA])
    with pytest.raises(PlanError, match="no weight of this run is quantized"):
        run.export(tmp_path / "q", packed=True)


def test_codes_that_can_be_read_in_two_ways_are_refused():
    form = formats.named("int3", group=10)
    reason = CompressedTensors().refusal(form, (4, 20))
    assert "in two ways" in reason and not CompressedTensors().refusal(form, (4, 320))


def exported(folder, settings, to, prepared):
    run = tr.compose(folder, [tr.Quantize(**settings), LORA, tr.Shard()], prepared=prepared)
    run.export(to, packed=True, adapter="default")


@sharded_codes
def test_ranks_write_the_folder_of_one_process(tmp_path):
    folder = saved("qwen3_moe", tmp_path / "m")
    one = tr.compose(folder, [tr.Quantize(**FORMATS["nvfp4"]), LORA])
    one.export(tmp_path / "one", packed=True, adapter="default")
    on_ranks(2, exported, folder, FORMATS["nvfp4"], tmp_path / "two", tmp_path / "prepared")
    for name in ("model.safetensors", "config.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arch", "name"),
    [("llama", n) for n in ("nvfp4", "mxfp4", "int4", "int3", "int8", "fp8")]
    + [("qwen3_moe", n) for n in ("mxfp4", "int4", "fp8")],
)
def test_transformers_opens_what_is_written(arch, name, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    run = tr.compose(saved(arch, tmp_path / "m"), [tr.Quantize(**FORMATS[name])], frozen=True)
    run.export(tmp_path / "q", packed=True)
    run.export(tmp_path / "dense")
    found, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.bfloat16) for n in ("q", "dense"))
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
