"""Adapter folders with a pair for each expert, under the names that experts have in published folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.experts.families import family
from tests.same import assert_same
from tests.techniques.lora.test_experts import logits
from tests.techniques.lora.test_math import randomised
from tests.zoo import build
from treering.core.errors import CheckpointError, PlanError
from treering.weights.conversion import to_file_layout

TARGETS = ("o_proj", "*.experts.*")
PREFIX = "base_model.model."


def exported(arch, folder, **settings):
    run = randomised(tr.compose(family(arch), [tr.LoRA(rank=3, alpha=5.0, targets=TARGETS, **settings)]))
    run.export(folder, adapter="default", experts="each")
    return (
        run,
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_every_pair_is_the_change_of_its_published_matrix(arch, tmp_path):
    run, tensors, config = exported(arch, tmp_path / "a")
    plain, merged = dict(family(arch).named_parameters()), dict(run.plain())
    change = {name: merged[name] - plain[name].detach() for name in plain if ".experts." in name}
    wanted = {}
    for name, value in change.items():
        wanted |= to_file_layout(run.model, {name: value})
    pairs = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    assert {f"{PREFIX}{name.removesuffix('.weight')}" for name in wanted} == {p for p in pairs if ".experts." in p}
    for name, value in wanted.items():
        key = f"{PREFIX}{name.removesuffix('.weight')}"
        found = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] * config["lora_alpha"] / config["r"]
        assert_same(found, value, 1e-4, name)  # of a difference of float32 weights
    assert "target_parameters" not in config and "o_proj" in config["target_modules"]
    assert {key.rpartition(".")[2] for key in pairs} == set(config["target_modules"])


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_what_is_exported_is_imported_bit_for_bit(arch, tmp_path):
    run, first, _ = exported(arch, tmp_path / "a")
    again = tr.compose(family(arch), [tr.LoRA.from_peft(tmp_path / "a")])
    assert torch.equal(logits(again.model), logits(run.model))
    again.export(tmp_path / "b", adapter="default", experts="each")
    second = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rslora", [False, True])
def test_gate_and_up_with_an_a_each_are_one_adapter_of_twice_the_rank(rslora, tmp_path):
    """As peft trained them when a model's experts were linear layers."""
    _, tensors, config = exported("qwen3_moe", tmp_path / "a", rslora=rslora)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if rslora else config["r"])
    for i, key in enumerate(sorted(key for key in tensors if "up_proj.lora_A" in key)):
        tensors[key] = 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(i))
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    run = tr.compose(family("qwen3_moe"), [tr.LoRA.from_peft(tmp_path / "a")])
    plain, merged = dict(family("qwen3_moe").named_parameters()), dict(run.plain())
    for name in [name for name in plain if "gate_up_proj" in name]:
        for key, value in to_file_layout(run.model, {name: merged[name] - plain[name].detach()}).items():
            pair = f"{PREFIX}{key.removesuffix('.weight')}"
            wanted = tensors[f"{pair}.lora_B.weight"] @ tensors[f"{pair}.lora_A.weight"] * scale
            assert_same(value, wanted, 1e-4, key)


def test_what_has_no_place_is_refused(tmp_path):
    run = tr.compose(family("gpt_oss"), [tr.LoRA(rank=2, targets=("*.experts.*",))])
    with pytest.raises(PlanError, match="keeps its experts as a stack"):
        run.export(tmp_path / "a", adapter="default", experts="each")
    with pytest.raises(PlanError, match="no adapter is exported; name one"):
        run.export(tmp_path / "a", experts="each")
    dense = tr.compose(build("llama"), [tr.LoRA(rank=2)])
    with pytest.raises(PlanError, match="'default' has none"):
        dense.export(tmp_path / "a", adapter="default", experts="each")
    _, tensors, _ = exported("qwen3_moe", tmp_path / "b")
    lost = next(key for key in tensors if "experts.2.down_proj.lora_B" in key)
    save_file({key: v for key, v in tensors.items() if key.replace("_B", "_A") != lost.replace("_B", "_A")},
              tmp_path / "b" / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"experts.2.down_proj.lora_A.weight and no"):
        tr.compose(family("qwen3_moe"), [tr.LoRA.from_peft(tmp_path / "b")])
