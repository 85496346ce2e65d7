import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.attention.packs import LENGTHS, packed, tokens
from tests.same import assert_same
from tests.zoo import ARCHITECTURES, build
from treering.attention import NAME, install


def configurations(model: nn.Module) -> list[tuple[str, PretrainedConfig]]:
    return [
        (f"{fqn}.{attribute}", value)
        for fqn, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, PretrainedConfig)
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_model_that_shares_the_configuration_is_untouched_and_undo_restores(name):
    model = build(name)
    twin = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    before, ids = configurations(model), tokens()
    truth = twin(ids, use_cache=False).logits

    undo = install(model)
    assert {config._attn_implementation for _, config in configurations(model)} == {NAME}
    assert {config._attn_implementation for _, config in configurations(twin)} == {"eager"}
    assert torch.equal(twin(ids, use_cache=False).logits, truth)

    undo()
    after = configurations(model)
    assert [fqn for fqn, _ in after] == [fqn for fqn, _ in before]
    assert all(now is then for (_, now), (_, then) in zip(after, before, strict=True))
    assert torch.equal(model(ids, use_cache=False).logits, truth)


def test_modules_that_shared_one_configuration_share_its_copy():
    model = build("llama")
    install(model)
    assert len({id(config) for _, config in configurations(model)}) == 1


def test_installing_twice_and_undoing_backwards_restores():
    model = build("llama")
    before = model.config
    first, second = install(model), install(model)
    second()
    assert model.config._attn_implementation == NAME
    first()
    assert model.config is before


def test_the_name_is_not_written_into_a_saved_configuration(tmp_path):
    model = build("llama")
    install(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@torch.no_grad()
def test_without_documents_padded_rows_are_what_they_were(name, padding):
    # the untouched attention that computes the same: eager where transformers has no sdpa
    native = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    model = build(name, attention=native)
    ids = torch.cat([tokens((24,)), tokens((24,), seed=1)])
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, :7] = 0
        mask = mask if padding == "left" else mask.flip(1)
    given = {} if padding == "none" else {"attention_mask": mask}
    truth = model(ids, use_cache=False, **given).logits[mask.bool()]
    install(model)
    found = model(ids, use_cache=False, **given).logits[mask.bool()]
    if native == "sdpa":
        assert torch.equal(found, truth)
    else:
        assert_same(found, truth, 1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_generation_says_the_same(name):
    model = build(name)
    ids = torch.cat([tokens((11,)), tokens((11,), seed=1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding, and longer than the window at the end
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(ids, **how)
    install(model)
    assert torch.equal(model.generate(ids, **how), truth)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_generation_with_a_static_cache_says_the_same(name):
    model, ids = build(name), tokens((11,))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(ids, **how)
    install(model)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **how), truth)


@torch.no_grad()
def test_right_padded_rows_without_a_mask_are_plain_causal():
    model = build("mistral", attention="sdpa")
    ids = torch.cat([tokens((24,)), tokens((24,), seed=1)])
    short = model(ids[1:, :17], use_cache=False).logits
    install(model)
    ids[1, 17:] = 0
    assert_same(model(ids, use_cache=False).logits[1:, :17], short, 1e-6)


def test_compiled_blocks_give_the_same_and_are_not_compiled_again_for_new_borders():
    from torch._dynamo.testing import CompileCounter

    model = build("mistral")
    install(model)
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    for block in model.model.layers:
        block.compile(backend=counter, dynamic=False)
    counts = []
    for lengths in (LENGTHS, LENGTHS[::-1], (sum(LENGTHS),), (60, 60)):
        given = packed(tokens(lengths), lengths)
        found, truth = model(**given).logits, plain(**given).logits
        assert_same(found, truth, 1e-6)
        found.sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert len(set(counts)) == 1
