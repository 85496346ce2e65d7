"""Where adapters begin."""

import math

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.toy import weights
from tests.zoo import build
from treering.core.sharded import gather
from treering.techniques.lora import reference


def starts(seed=0, shard=False, **settings):
    techniques = [tr.LoRA(**({"rank": 3} | settings)), *([tr.Shard()] if shard else [])]
    run = tr.compose(build("llama"), techniques, seed=seed)
    return {name: gather(p).clone() for name, p in run.trainable()}


def test_kaiming_depends_on_seed_and_names_only():
    first = starts()
    assert_all_same(starts(), first)
    for other in (starts(seed=1), {k.replace("two", "default"): v for k, v in starts(name="two").items()}):
        assert not any(torch.equal(other[name], value) for name, value in first.items() if name.endswith(".A"))
    some = starts(targets=("q_proj",))  # nor on what else is adapted
    assert_all_same(some, {name: first[name] for name in some})
    A = [value for name, value in first.items() if name.endswith(".A")]
    assert len({tuple(a.flatten()[:4].tolist()) for a in A}) == len(A), "two linears share a start"


def test_kaiming_has_the_bounds_of_the_paper():
    for name, value in starts(rank=16).items():
        if name.endswith(".B"):
            assert not value.any()
        else:
            bound = math.sqrt(1 / value.shape[1])
            assert 0.9 * bound < value.abs().max() <= bound and abs(value.mean()) < 0.15 * bound


def test_kaiming_is_the_same_on_every_number_of_ranks():
    wanted = starts()
    for found in on_ranks(3, starts, 0, True):  # 3 does not divide any dimension of B
        assert_all_same(found, wanted)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 2.0}, {"alpha": 9.0, "rslora": True}], ids=str)
def test_pissa_moves_the_largest_directions_into_the_adapter(arch, settings):
    targets = ("c_attn", "c_fc") if arch == "gpt2" else ("k_proj", "down_proj")
    config = tr.LoRA(rank=3, init="pissa", targets=targets, **settings)
    before = {name: p.detach().clone() for name, p in build(arch).named_parameters()}
    run = tr.compose(build(arch), [config])
    assert max(run.lost.values()) <= 1e-6 and len(run.lost) == 4
    assert_all_same({n: w for n, w in weights(run).items() if n in before}, before, 1e-6)
    for linear in config.matrices(run.plan.anatomy):
        module = run.model.get_submodule(linear.module)
        W = before[linear.weight].double()
        W = W.T if linear.transposed else W
        S = torch.linalg.svdvals(W)
        A, B = module.lora_default.A.double(), module.lora_default.B.double()
        adapter = reference.merged(torch.zeros_like(W), A, B, config.of(linear).scale)
        # Eckart–Young: no matrix of rank r is closer, and what stays in the base is the rest of the spectrum
        assert_same((W - adapter).norm(), S[3:].norm(), 1e-5, "distance to the best rank-3 approximation")
        base = module.weight.detach().double()
        assert_same(torch.linalg.svdvals(base)[: len(S) - 3], S[3:], 1e-5, "spectrum of the base")
        # balanced: both factors carry √S
        assert_same(
            module.lora_default.A.detach().double().norm(), module.lora_default.B.detach().double().norm(), 1e-5
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "base"])
def test_pissa_in_a_bfloat16_model_keeps_its_promise(dtype):
    model = build("llama").to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = tr.compose(model, [tr.LoRA(rank=3, init="pissa", dtype=dtype)])
    promised = {part.tolerance for chain in run.plan.chains.values() for part in chain.parts}
    assert promised == {4 * torch.finfo(torch.bfloat16).eps}
    assert 0 < max(run.lost.values()) <= promised.pop()
    for name, value in weights(run).items():
        assert value.dtype == torch.bfloat16
        assert (value.double() - before[name].double()).norm() <= 0.02 * before[name].double().norm()


def test_pissa_on_ranks_is_pissa_on_one(tmp_path):
    found = on_ranks(2, pissa_on_ranks, tmp_path)
    wanted = starts(init="pissa")
    for one in found:
        assert_all_same(one, wanted)


def pissa_on_ranks(folder):
    run = tr.compose(build("llama"), [tr.LoRA(rank=3, init="pissa"), tr.Shard()], prepared=folder)
    return {name: gather(p).clone() for name, p in run.trainable()}
