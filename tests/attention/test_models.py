"""The oracle for every architecture of the zoo: each document alone, through the untouched model."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.attention.packs import LENGTHS, packed, tokens
from tests.same import assert_same
from tests.zoo import ARCHITECTURES, build
from treering.attention import install

MOE = {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return torch.cat([model(row, use_cache=False).logits for row in ids.split(LENGTHS, dim=1)], dim=1)


@architectures
@torch.no_grad()
def test_packed_logits_are_those_of_each_document_alone_in_eager_attention(name):
    model, ids = build(name), tokens()
    truth = alone(model, ids)
    install(model)
    assert_same(model(**packed(ids)).logits, truth, 1e-6)


# what transformers itself computes in float32, whatever the model is: the softmax of eager attention in most
# architectures (sdpa does for them; gemma2 has none, for its softcap) and deepseek_v3's router
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"gemma2", "deepseek_v3"}))
@torch.no_grad()
def test_in_float64_packed_logits_are_those_of_each_document_alone_to_ten_digits(name):
    native = name in ("gpt2", "gpt_oss")
    model, ids = build(name, dtype=torch.float64, attention="eager" if native else "sdpa"), tokens()
    truth = alone(model, ids)
    install(model)
    assert_same(model(**packed(ids)).logits, truth, 1e-10)


@architectures
@torch.no_grad()
def test_changing_one_document_leaves_the_others_as_they_were(name):
    model = build(name)
    install(model)
    ids = tokens()
    before = model(**packed(ids)).logits.split(LENGTHS, dim=1)
    start = sum(LENGTHS[:2])
    ids[:, start : start + LENGTHS[2]] = tokens(seed=1)[:, : LENGTHS[2]]
    after = model(**packed(ids)).logits.split(LENGTHS, dim=1)
    assert not torch.equal(before[2], after[2])
    for i in (0, 1, 3, 4, 5):
        if name in MOE:
            assert_same(after[i], before[i], 1e-6)
        else:
            assert torch.equal(after[i], before[i])


@architectures
def test_gradients_of_a_loss_on_one_document_are_those_of_it_alone(name):
    model, ids = build(name, dtype=torch.float64, attention="eager"), tokens()
    start, length = sum(LENGTHS[:2]), LENGTHS[2]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = logits.logsumexp(-1).square().sum()
        return list(torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True))

    truth = gradients(model(ids[:, start : start + length], use_cache=False).logits)
    install(model)
    found = gradients(model(**packed(ids)).logits[:, start : start + length])
    largest = max(g.abs().max() for g in truth)
    for parameter, ours, wanted in zip(parameters, found, truth, strict=True):
        assert (ours - wanted).abs().max() / largest < 1e-6, parameter


@architectures
def test_a_recompute_of_the_blocks_gives_bitwise_the_same_gradients(name):
    model, ids = build(name).train(), tokens()
    install(model)

    def gradients() -> list[Tensor]:
        loss = model(**packed(ids)).logits.logsumexp(-1).square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    stored = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for ours, wanted in zip(gradients(), stored, strict=True):
        assert torch.equal(ours, wanted)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@architectures
def test_no_tensor_as_large_as_a_mask_is_made(name):
    lengths = (200, 150, 1, 100, 61)
    model = build(name)
    install(model)
    with Largest() as largest:
        model(**packed(tokens(lengths), lengths)).logits.square().sum().backward()
    assert 512 * 128 <= largest.elements < 512 * 512


@torch.no_grad()
def test_many_documents_of_one_token_and_one_document_alone():
    model = build("gemma2")
    ids = tokens()
    truth = torch.cat([model(token, use_cache=False).logits for token in ids.split(1, dim=1)], dim=1)
    whole = model(ids, use_cache=False).logits
    install(model)
    assert_same(model(**packed(ids, (1,) * ids.shape[1])).logits, truth, 1e-6)
    assert_same(model(**packed(ids, (ids.shape[1],))).logits, whole, 1e-6)
