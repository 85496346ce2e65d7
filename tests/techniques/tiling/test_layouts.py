"""Layouts of blocks besides those of the zoo: exact in tiles, or refused when the plan is made."""

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

import treering as tr
from tests.anatomy.shrink import tiny_config
from tests.same import assert_all_same, assert_same
from tests.toy import rows
from tests.zoo import ARCHITECTURES, build, randomise
from treering.core.errors import PlanError
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP

BLOCKS = {
    "falcon": {},
    "falcon, one norm before both": {"parallel_attn": True, "new_decoder_architecture": False},
    "falcon, one after the other": {"parallel_attn": False, "new_decoder_architecture": False},
    "mpt": {},
    "opt": {},
    "bloom": {},
    "bloom, the norm as residual": {"apply_residual_connection_post_layernorm": True},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "afmoe": {"num_dense_layers": 1},
    "llama4_text": {"moe_layers": [1, 3]},
}


def model_of(name):
    if name == "latent attention without q_a_proj":
        config = ARCHITECTURES["deepseek_v3"]()
        config.q_lora_rank = None
    else:
        config = tiny_config(name.partition(",")[0])
    for key, value in BLOCKS.get(name, {}).items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
    )
    randomise(model, 0)
    return model.eval()


WIDE = {
    "granitemoeshared": 1e-6,
    "llama4_text": 1e-6,
}  # their routers compute in float32, whatever the model's dtype is


def gradients(name, techniques):
    run = tr.compose(model_of(name), [tr.Full(), *techniques], dropout="off")
    found = {}
    for ready in run.steps([rows(2, lengths=(7, 13))]):
        for i, batch in enumerate(ready):
            loss = run.loss(batch)
            found[f"loss {i}"] = loss.detach()
            loss.backward()
    # The gradient of a key's bias is 0 up to rounding.
    return found | {key: p.grad for key, p in run.trainable() if p.grad is not None and p.grad.abs().max() > 1e-12}


@pytest.mark.parametrize("name", [*BLOCKS, "latent attention without q_a_proj"])
def test_blocks_of_other_layouts_train_as_without_tiles(name):
    assert_all_same(
        gradients(name, [TiledBlock(tile=4), TiledLoss(tile=3)]), gradients(name, []), WIDE.get(name, 1e-12)
    )


@pytest.mark.parametrize("name", ["granitemoeshared", "llama4_text"])
def test_feed_forward_parts_of_several_modules_and_with_routers_inside(name):
    assert_all_same(gradients(name, [TiledMLP(tile=4)]), gradients(name, []), WIDE.get(name, 1e-12))


def test_a_projection_that_is_named_and_absent_is_none_of_a_layout():
    model = build("deepseek_v3")
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj = torch.nn.Linear(32, attention.num_heads * attention.qk_head_dim, bias=False)
        attention.q_a_proj, attention.q_lora_rank = None, None
    ids = rows(1)[0]["input_ids"]
    wanted = model(ids, use_cache=False).logits
    run = tr.compose(model, [tr.Full(), TiledBlock(tile=4)])
    assert_same(run.model(ids, use_cache=False).logits, wanted, 1e-5)


def test_a_norm_after_what_it_normalises_is_refused_when_the_plan_is_made():
    config = hf.OPTConfig(**{**tiny_config("opt").to_dict(), "do_layer_norm_before": False})
    with pytest.raises(PlanError, match=r"model\.decoder\.layers\.0 .*not laid out in a known way"):
        tr.compose(AutoModelForCausalLM.from_config(config), [tr.Full(), TiledBlock()], dropout="off")


def test_an_unknown_layout_leaves_the_model_as_it_was():
    model = build("llama")
    ids, before = rows(1)[0]["input_ids"], model.model.layers[1].forward
    wanted = model(ids, use_cache=False).logits
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, out: torch.tanh(out))
    with pytest.raises(PlanError, match=r"model\.layers\.0 .*tanh is applied.* Use tiledmlp instead"):
        tr.compose(model, [tr.Full(), TiledBlock(tile=4)])
    norm._forward_hooks.clear()
    assert model.model.layers[1].forward == before
    assert torch.equal(model(ids, use_cache=False).logits, wanted)


def test_models_without_attention_are_referred_to_what_they_can_have():
    model = AutoModelForCausalLM.from_config(tiny_config("mamba"))
    for technique in (TiledBlock(), TiledMLP()):
        with pytest.raises(PlanError, match="recompute and tiledloss can be used with it"):
            tr.compose(model, [tr.Full(), technique])
    run = tr.compose(model, [tr.Full(), tr.Recompute(), TiledLoss(tile=4)])
    (ready,) = run.steps([rows(1)])
    run.loss(ready[0]).backward()


def test_a_feed_forward_part_in_pieces_is_referred_to_tiled_blocks():
    model = AutoModelForCausalLM.from_config(tiny_config("opt"))
    with pytest.raises(PlanError, match=r"fc1, fc2.*use tiledblock instead"):
        tr.compose(model, [tr.Full(), TiledMLP()], dropout="off")
