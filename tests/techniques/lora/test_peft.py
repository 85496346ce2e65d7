"""Adapter folders: the real peft package opens ours, and we open what it wrote."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.techniques.lora.test_math import randomised
from tests.toy import rows, train
from tests.zoo import build

IDS = torch.arange(3, 19)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def peft_made(arch, folder, **settings):
    """An adapter with a non-zero B, saved by peft; returns peft's own logits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", **({"r": 3, "lora_alpha": 7} | settings))
    model = get_peft_model(build(arch, attention="sdpa"), config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("settings", [{"alpha": 6.0}, {"alpha": 6.0, "rslora": True, "name": "second"}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_peft_opens_what_we_export(arch, settings, tmp_path):
    from peft import PeftModel

    run = randomised(tr.compose(build(arch), [tr.LoRA(rank=3, **settings)]))
    run.export(tmp_path / "a", adapter=settings.get("name", "default"))
    opened = PeftModel.from_pretrained(build(arch, attention="sdpa"), tmp_path / "a")
    # In float64: adapters as large as these multiply rounding errors of float32 by up to ten thousand.
    assert_same(logits(copy.deepcopy(run.model).double()), logits(copy.deepcopy(opened).double()), 1e-9, "logits")
    merged = opened.merge_and_unload()
    run.export(tmp_path / "dense")
    theirs = merged.state_dict()
    for name, value in run.plain():
        assert_same(theirs[name], value, 1e-6, name)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        ("qwen2", {"target_modules": r".*layers\.1\..*(k|up)_proj", "lora_alpha": 1}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_we_open_what_peft_wrote_and_go_on_training(arch, settings, tmp_path):
    wanted = peft_made(arch, tmp_path / "a", **settings)
    run = tr.compose(build(arch), [tr.LoRA.from_peft(tmp_path / "a")])
    assert_same(logits(run.model.eval()), wanted, 1e-6, "logits")
    assert len(run.trainable()) == len(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    run.model.train()
    before = {name: p.detach().clone() for name, p in run.trainable()}
    first, *_, last = train(run, [rows(2)] * 4, lr=0.05)
    assert last < first
    assert all(not torch.equal(p, before[name]) for name, p in run.trainable())


def test_what_we_export_we_import_bit_for_bit(tmp_path):
    run = randomised(tr.compose(build("llama"), [tr.LoRA(rank=3, alpha=5.0, rslora=True)]))
    run.export(tmp_path / "a", adapter="default")
    again = tr.compose(build("llama"), [tr.LoRA.from_peft(tmp_path / "a", name="back")])
    again.export(tmp_path / "b", adapter="back")
    first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(logits(run.model), logits(again.model))


def test_an_imported_adapter_and_a_new_one_go_together(tmp_path):
    wanted = peft_made("llama", tmp_path / "a", target_modules=["q_proj"])
    run = tr.compose(build("llama"), [tr.LoRA.from_peft(tmp_path / "a", name="old"), tr.LoRA(rank=2, name="new")])
    assert_same(logits(run.model), wanted, 1e-6)


def export_on_ranks(folder):
    run = tr.compose(build("llama"), [tr.LoRA(rank=3, alpha=5.0), tr.Shard()])
    train(run, [rows(4)[torch.distributed.get_rank() :: 2]])
    before = {name: p.full_tensor().detach().clone() for name, p in run.trainable()}
    run.export(folder, adapter="default")
    return before


def test_two_ranks_write_every_bit_that_they_hold(tmp_path):
    first, second = on_ranks(2, export_on_ranks, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = load_file(tmp_path / "two" / "adapter_model.safetensors")
    names = {f"base_model.model.{n.replace('lora_default.', 'lora_')}.weight": v for n, v in first.items()}
    assert found.keys() == names.keys() and all(torch.equal(found[k], v) for k, v in names.items())


def untrained_export(folder):
    tr.compose(build("llama"), [tr.LoRA(rank=3, alpha=5.0), tr.Shard()]).export(folder, adapter="default")


def test_the_files_of_two_ranks_are_bytes_of_one(tmp_path):
    on_ranks(2, untrained_export, tmp_path / "two")
    tr.compose(build("llama"), [tr.LoRA(rank=3, alpha=5.0)]).export(tmp_path / "one", adapter="default")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_that_moved_its_base_is_not_exported_alone(tmp_path):
    run = tr.compose(build("llama"), [tr.LoRA(rank=3, init="pissa")])
    with pytest.raises(tr.PlanError, match=r"moved the base weights.*export the dense model"):
        run.export(tmp_path / "a", adapter="default")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    run = tr.compose(build("llama"), [tr.LoRA(rank=3, name="mine")])
    with pytest.raises(tr.PlanError, match="no adapter called 'yours'; there is mine"):
        run.export(tmp_path / "a", adapter="yours")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    run = tr.compose(build("llama"), [tr.LoRA(rank=3)])
    return run.export(tmp_path / "a", adapter="default")


def configured(folder, **changes):
    path = folder / "adapter_config.json"
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in body.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
        ({"alpha_pattern": [8]}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": ...}, "peft_type"),
        ({"target_modules": None}, "target_modules"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow"),
        ({"r": "3"}, "r is '3'"),
        ({"r": 0}, "r is 0"),
        ({"r": ...}, "r is None"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        # these starts moved the base model; the folder fits a model that we do not have
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_a_config_that_means_something_else_is_refused_by_name(folder, changes, word):
    configured(folder, **changes)
    with pytest.raises(tr.CheckpointError) as caught:
        tr.LoRA.from_peft(folder)
    assert word in str(caught.value) and "adapter_config.json" in str(caught.value)


def test_what_peft_leaves_out_has_pefts_defaults(folder):
    configured(folder, lora_alpha=...)
    assert tr.LoRA.from_peft(folder).alpha == 8.0


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "3"])
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(tr.CheckpointError, match=r"adapter_config\.json"):
        tr.LoRA.from_peft(folder)


def test_folders_without_their_files_are_refused(folder, tmp_path):
    with pytest.raises(tr.CheckpointError, match=r"no adapter_config\.json"):
        tr.LoRA.from_peft(tmp_path / "absent")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(tr.CheckpointError, match=r"adapter_model\.bin is a pickle and never read"):
        tr.LoRA.from_peft(folder)


def edited(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_of_a_pair_is_refused(folder, half):
    edited(folder, lambda t: t.pop(f"{KEY}.{half}.weight"))
    with pytest.raises(tr.CheckpointError, match=f"{half}.weight"):
        tr.compose(build("llama"), [tr.LoRA.from_peft(folder)])


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_another_shape_is_refused(folder, half):
    edited(folder, lambda t: t.update({f"{KEY}.{half}.weight": torch.ones(5, 5)}))
    with pytest.raises(tr.CheckpointError, match=r"up_proj\.weight has A.*\(5, 5\).*rank 3 need"):
        tr.compose(build("llama"), [tr.LoRA.from_peft(folder)])


@pytest.mark.parametrize(
    "key", ["base_model.model.lm_head.modules_to_save.weight", f"{KEY}.lora_magnitude_vector", "x"]
)
def test_a_tensor_that_is_no_adapter_is_refused(folder, key):
    edited(folder, lambda t: t.update({key: torch.ones(1)}))
    with pytest.raises(tr.CheckpointError, match=key):
        tr.LoRA.from_peft(folder)


def test_an_adapter_of_another_model_is_refused(folder):
    with pytest.raises(tr.PlanError, match="matches no linear layer and no stack of experts of this gpt2 model"):
        tr.compose(build("gpt2"), [tr.LoRA.from_peft(folder)])


@pytest.mark.parametrize("keep", [0, 9, -1])
def test_a_file_that_was_cut_short_is_refused(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(tr.CheckpointError, match="not a complete safetensors file"):
        tr.LoRA.from_peft(folder)
