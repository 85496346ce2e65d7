"""Whole models: with recompute, wherever the inputs wait, every gradient is the same to the last bit."""

import inspect

import pytest
import torch

import treering as tr
from tests.same import assert_all_same
from tests.toy import gradients, packed, rows, train, weights
from tests.zoo import ARCHITECTURES, build
from treering.curvature import observe
from treering.technique import recompute_state
from treering.techniques.recompute import Recompute

OURS = {"here": Recompute(), "offloaded": Recompute(offload="cpu")}


def composed(*techniques, arch="llama", **how):
    return tr.compose(build(arch, **how), [tr.Full(), *techniques])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_of_every_architecture_are_bitwise_those_without(arch):
    batches = rows(2)
    wanted = gradients(composed(arch=arch), batches)
    for ours in OURS.values():
        assert_all_same(gradients(composed(ours, arch=arch), batches), wanted)


def block_rows():
    """Three right-padded rows at once."""
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9)[None] >= torch.tensor([[9], [4], [6]]), -100)
    return [{"input_ids": ids, "labels": labels, "samples": []}]


CASES = {
    "packed documents": ({}, [packed((7, 5, 4)), packed((9, 7), seed=1)]),
    "packed documents with a window": ({"arch": "gemma3"}, [packed((17, 5))]),
    "bfloat16": ({"dtype": torch.bfloat16}, rows(2)),
    "several rows": ({}, block_rows()),
    "tied embeddings": ({"tied": True}, rows(2)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_bitwise_those_without_for(case):
    how, batches = CASES[case]
    wanted = gradients(composed(**how), batches)
    for ours in OURS.values():
        assert_all_same(gradients(composed(ours, **how), batches), wanted)


def test_adapters_and_a_frozen_rest():
    learns = tr.LoRA(rank=2, targets=("q_proj", "down_proj"))

    def once(*techniques):
        run = tr.compose(build("llama"), [learns, *techniques])
        train(run, [rows(2), rows(3, seed=1)], lr=0.2)
        return weights(run)

    wanted = once()
    for ours in OURS.values():
        assert_all_same(once(ours), wanted)


def test_dropout_of_a_model_is_drawn_again_alike():
    def once(*techniques):
        model = build("llama", attention="sdpa")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        run = tr.compose(model, [tr.Full(), *techniques], dropout="per_rank")
        torch.manual_seed(3)
        return gradients(run, rows(2))

    wanted = once()
    for ours in OURS.values():
        assert_all_same(once(ours), wanted)
    assert not torch.equal(wanted["lm_head.weight"], gradients(composed(), rows(2))["lm_head.weight"])


def test_one_tensor_of_the_model_width_leaves_for_each_block_but_the_last():
    run = composed(OURS["offloaded"])
    engine = run.model.model.layers[0].forward.engine
    gradients(run, rows(3))
    assert engine.sent == 3 and engine.pool.used == 0
    assert run.metrics() == {"offloaded_gib": engine.pool.allocated / 2**30}


def test_keys_signatures_and_exports_stay_and_undo_is_exact(tmp_path):
    plain = build("llama")
    keys, signature = list(plain.state_dict()), inspect.signature(plain.model.layers[0].forward)
    run = composed(OURS["offloaded"], attention="sdpa")  # what undo leaves is the model's own attention
    block = run.model.model.layers[0]
    assert list(run.model.state_dict()) == keys and inspect.signature(block.forward) == signature
    wanted = gradients(run, rows(2))
    run.export(tmp_path / "out")
    run.undo()
    assert not {"forward", "compile"} & set(vars(block))
    run.model.zero_grad()
    assert_all_same(gradients(run, rows(2)), wanted)


def test_undo_gives_back_a_forward_that_was_replaced_before():
    model = build("llama")
    block = model.model.layers[0]
    own = block.forward
    calls = []

    def replaced(*args, **kwargs):
        calls.append(recompute_state())
        return own(*args, **kwargs)

    block.forward = replaced
    run = tr.compose(model, [tr.Full(), Recompute()])
    gradients(run, rows(1))
    assert calls == ["forward", "recompute"]
    run.undo()
    assert block.forward is replaced


def test_whoever_watches_counts_each_token_once():
    def measured(*techniques):
        run = composed(*techniques)
        with observe(run.model, run.plan.anatomy) as watch:
            gradients(run, rows(2))
        return watch.statistics()

    wanted, found = measured(), measured(OURS["offloaded"])
    assert list(found) == list(wanted) and len(found) == 14
    for weight in wanted:
        assert found[weight]["tokens"] == wanted[weight]["tokens"]
        assert torch.equal(found[weight]["inputs"], wanted[weight]["inputs"])


def test_a_key_value_cache_is_refused_with_gradients_and_works_without():
    run = composed(Recompute())
    ids = torch.arange(3, 9)[None]
    with pytest.raises(tr.PlanError, match="use_cache=False"):
        run.model(ids, use_cache=True)
    with torch.no_grad():
        found = run.model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    wanted = composed().model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(found, wanted)


def test_in_evaluation_mode_gradients_are_the_same_as_well():
    wanted = composed()
    run = composed(OURS["offloaded"])
    run.model.eval()
    assert_all_same(gradients(run, rows(2)), gradients(wanted, rows(2)))
