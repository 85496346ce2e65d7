"""What learns is what the patterns name, and nothing else."""

import pytest
import torch

import treering as tr
from tests.toy import rows, train
from tests.zoo import ARCHITECTURES, build


def learns(technique, arch="llama"):
    return {name for name, _ in tr.compose(build(arch), [technique]).trainable()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_patterns_everything_learns(arch):
    assert learns(tr.Full(), arch) == set(dict(build(arch).named_parameters()))


@pytest.mark.parametrize(
    ("technique", "wanted"),
    [
        (tr.Full(train=("q_proj",)), {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}),
        (tr.Full(train=("*.layers.1.*norm*", "lm_head")), {
            "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight", "lm_head.weight",
        }),
        (tr.Full(train=("*_proj*",), freeze=("model.layers.1.*", "q_proj", "*.mlp.*")), {
            f"model.layers.0.self_attn.{x}_proj.weight" for x in "kvo"
        }),
    ],
    ids=("one name", "names and a pattern", "a pattern less others"),
)  # fmt: skip
def test_patterns_choose(technique, wanted):
    assert learns(technique) == wanted


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_moves():
    before = {name: p.detach().clone() for name, p in build("llama").named_parameters()}
    run = tr.compose(build("llama"), [tr.Full(freeze=("embed_tokens", "model.layers.0.*"))])
    train(run, [rows(3)])
    for name, value in run.plain():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(value, before[name]) == frozen, name
    assert not any(p.grad is not None for p in run.model.parameters())


def test_gradients_exist_only_where_something_learns():
    run = tr.compose(build("llama"), [tr.Full(train=("v_proj",))])
    for [ready] in run.steps([rows(1)]):
        run.loss(ready).backward()
    assert {n for n, p in run.model.named_parameters() if p.grad is not None} == {n for n, _ in run.trainable()}


def test_a_live_models_own_requires_grad_does_not_matter():
    model = build("llama")
    model.requires_grad_(False)
    assert len(tr.compose(model, [tr.Full()]).trainable()) == len(list(model.parameters()))


@pytest.mark.parametrize("technique", [tr.Full(train=("q_prj",)), tr.Full(freeze=("model.norm",))], ids=str)
def test_a_pattern_that_names_nothing_is_refused_with_names_that_exist(technique):
    with pytest.raises(
        tr.PlanError, match=r"full: the pattern '.*' matches no parameter; there are model\.embed_tokens"
    ):
        learns(technique)


def test_freezing_everything_is_refused():
    with pytest.raises(tr.PlanError, match="nothing is left to train"):
        learns(tr.Full(train=("q_proj",), freeze=("*",)))


def test_a_tied_pair_is_one_parameter_under_its_first_name():
    assert learns(tr.Full(train=("wte",)), "gpt2") == {"transformer.wte.weight"}
    with pytest.raises(tr.PlanError, match="'lm_head' matches no parameter"):
        learns(tr.Full(train=("lm_head",)), "gpt2")


def test_two_of_them_train_the_union_or_are_refused_where_they_meet():
    both = [tr.Full(train=("q_proj",)), tr.Full(train=("k_proj",))]
    assert len(tr.compose(build("llama"), both).trainable()) == 4
    with pytest.raises(tr.PlanError, match="decide what happens to the gradient"):
        tr.compose(build("llama"), [tr.Full(train=("q_proj",)), tr.Full(train=("q_proj", "k_proj"))])
