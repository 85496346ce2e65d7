"""Stacked experts in tiles of tokens and in groups of experts; the router is outside of both."""

from itertools import accumulate

import pytest
import torch

from tests.same import assert_all_same, assert_same
from tests.techniques.tiling.test_tile import random
from tests.zoo import build
from treering.anatomy import examine
from treering.memory.tracker import Tracker
from treering.technique import Site, recompute_state
from treering.techniques.tiling import TiledMLP
from treering.techniques.tiling.groups import KNOWS_ELSEWHERE

GROUPS = pytest.mark.skipif(not KNOWS_ELSEWHERE, reason="refused: no number for experts elsewhere before 5.18")
WAYS = {
    "tokens": TiledMLP(tile=3),
    "groups": TiledMLP(tile=3, experts="groups"),
    "one group": TiledMLP(experts="groups"),
}


def tiled(model, technique):
    return technique.apply(model, Site(anatomy=examine(model), mesh=None))


def with_auxiliary_loss(model):
    """Gradients of the logits and of a loss on what the router gives, as transformers adds it for balance."""
    ids = torch.arange(24).view(2, 12)
    logits = []
    hooks = [
        block.mlp.gate.register_forward_hook(lambda m, a, out: logits.append(out[0])) for block in model.model.layers
    ]
    y = model(ids, use_cache=False).logits
    balance = sum(z.softmax(-1).mean(0).square().sum() for z in logits)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    (y.sum() + 100 * balance).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["tokens", *(pytest.param(way, marks=GROUPS) for way in ("groups", "one group"))])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_the_gradient_of_a_loss_on_the_router_is_exact(how, implementation):
    model = build("qwen3_moe", dtype=torch.float64, experts=implementation)
    wanted = with_auxiliary_loss(model)
    tiled(model, WAYS[how])
    assert_all_same(with_auxiliary_loss(model), wanted, 1e-12)


@GROUPS
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_groups_never_see_a_weight_twice_and_use_the_experts_own_forward(implementation):
    model = build("qwen3_moe", experts=implementation)
    experts = model.model.layers[0].mlp.experts
    x, index = (
        random(20, 32),
        torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(20)]),
    )
    weights = random(20, 2, key="w")
    leaves = [x, weights, *experts.parameters()]
    y = experts(x, index, weights)
    wanted = torch.autograd.grad(y.square().sum(), leaves)
    seen = []
    plain = experts.forward

    def watched(*args):
        seen.append((recompute_state(), experts.gate_up_proj.shape[0]))
        return plain(*args)

    experts.forward = watched
    tiled(model, WAYS["groups"])
    found = experts(x, index, weights)
    assert_same(found, y, 1e-6)
    for a, b in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        assert_same(a, b, 1e-6)
    check, rest = seen[:3], seen[3:]
    assert [n for _, n in check] == [4, 4, 4]
    assert rest == [("forward", 1)] * 4 + [("tile", 1)] * 4
    assert experts.num_experts == 4 and experts.gate_up_proj.shape[0] == 4 and not experts._is_expert_parallel


@GROUPS
def test_frozen_experts_in_groups_still_pass_the_gradient_on():
    model = build("qwen3_moe", dtype=torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_("experts.down_proj" in name or "gate.weight" in name)
    named = [p for p in model.parameters() if p.requires_grad]
    loss = lambda: model(torch.arange(12)[None], use_cache=False).logits.square().sum()  # noqa: E731
    wanted = torch.autograd.grad(loss(), named)
    tiled(model, WAYS["groups"])
    for a, b in zip(torch.autograd.grad(loss(), named), wanted):
        assert_same(a, b, 1e-12)


@GROUPS
def test_groups_need_more_memory_than_tiles_of_tokens_and_explain_says_so():
    peaks = {}
    for how in ("tokens", "groups"):
        model = build("qwen3_moe", experts="grouped_mm")
        notes = tiled(model, TiledMLP(tile=64, experts=how)).notes
        experts = model.model.layers[0].mlp.experts
        x, index, weights = random(512, 32), torch.arange(1024).view(512, 2) % 4, random(512, 2, key="w")
        experts(x[:4], index[:4], weights[:4])  # what is checked at the first call is no part of the peak
        tracker = Tracker(torch.device("cpu"))
        with tracker:
            experts(x, index, weights).sum().backward()
        peaks[how] = max(accumulate(by for by, _, _ in list(tracker.events)))
        assert ("tokens needs less" in notes[0]) == (how == "groups")
    assert peaks["groups"] > 1.5 * peaks["tokens"]


def test_shared_experts_are_tiled_like_any_mlp():
    model = build("deepseek_v3")
    note = tiled(model, TiledMLP(tile=3)).notes
    assert note == (
        "2 MLPs in tiles of 3 tokens",
        "the experts of 1 blocks in tiles of 3 tokens, routers outside",
    )
    assert "forward" in vars(model.model.layers[1].mlp.shared_experts)
    assert "forward" not in vars(model.model.layers[1].mlp)
