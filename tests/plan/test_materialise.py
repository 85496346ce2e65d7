"""From meta to memory: true buffers, no random number drawn, ties kept."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import treering as tr
from tests.zoo import ARCHITECTURES, build, save
from treering.plan.load import materialise

CPU = torch.device("cpu")


def on_meta(arch):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(ARCHITECTURES[arch]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_buffers_that_no_file_holds_are_those_of_from_pretrained(arch, dtype, tmp_path):
    build(arch, dtype=dtype).save_pretrained(tmp_path / "m")
    wanted = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").named_buffers())
    buffers = dict(tr.compose(tmp_path / "m", [tr.Full()]).model.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, value in wanted.items():
        assert buffers[name].dtype == value.dtype and torch.equal(buffers[name], value), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float32], ids=str)
def test_a_buffer_that_nobody_computes_is_refused_by_name(dtype):
    model = on_meta("llama")
    strange = torch.zeros(3, dtype=dtype, device="meta")
    model.model.layers[1].mlp.register_buffer("strange", strange, persistent=False)
    with pytest.raises(tr.PlanError, match=r"the buffer 'strange' of LlamaMLP.*give compose.. the live model"):
        materialise(model, CPU, CPU)


@pytest.mark.parametrize("arch", ["gemma3", "llama"])
def test_nothing_is_drawn_from_the_users_generator(arch, tmp_path):
    folder = save(arch, tmp_path / "m")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    tr.compose(folder, [tr.LoRA(rank=2)])
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_tied_pair_stays_one_parameter():
    model = on_meta("gpt2")
    materialise(model, CPU, CPU)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert isinstance(model.lm_head.weight, nn.Parameter)


def test_a_live_models_buffers_are_kept_as_they_are():
    model = build("llama")
    model.model.rotary_emb.inv_freq.mul_(2)
    wanted = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(tr.compose(model, [tr.Full()]).model.model.rotary_emb.inv_freq, wanted)


def test_a_live_model_of_another_dtype_than_asked_for_is_refused():
    with pytest.raises(tr.PlanError, match=r"dtype is bfloat16 and the live model is torch\.float32; cast it before"):
        tr.compose(build("llama"), [tr.Full()], dtype="bfloat16")
    with pytest.raises(tr.PlanError, match="dtype is 'bf16'; write auto or one of float32"):
        tr.compose(build("llama"), [tr.Full()], dtype="bf16")
    tr.compose(build("llama"), [tr.Full()], dtype="float32")


def test_a_plan_of_a_live_model_gives_its_weights_once():
    from treering.plan import draft, load

    plan = draft(build("llama"), [tr.Full()])
    load(plan)
    with pytest.raises(tr.PlanError, match="given its weights away already"):
        load(plan)


def test_layers_that_are_dropped_at_random_count_as_dropout():
    model = build("llama")
    model.model.layerdrop = 0.1
    with pytest.raises(tr.PlanError, match=r"model\.layerdrop = 0\.1"):
        tr.compose(model, [tr.Full()])
