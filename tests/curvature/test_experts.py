"""Each expert's moments are those of the tokens that the router sent to it, for its first and its second weight."""

import pytest
import torch
from torch.nn import functional as F

import treering as tr
from tests.curvature.texts import documents, packed, rows, silent
from tests.same import assert_same
from tests.zoo import build
from treering.anatomy import examine
from treering.curvature import observe

NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]


def plain(model, anatomy, given):
    """Written anew: routes are taken from what the module is called with, activations from the family's formula."""
    total, count = {}, {}
    calls = {}
    handles = [
        model.get_submodule(e.fqn).register_forward_pre_hook(
            lambda module, args, kwargs, fqn=e.fqn: calls.setdefault(fqn, []).append((args, kwargs)), with_kwargs=True
        )
        for e in anatomy.experts
    ]
    with torch.no_grad():
        for ids in given:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    for e in anatomy.experts:
        module = model.get_submodule(e.fqn).double()
        first, second = e.stacked
        for args, kwargs in calls[e.fqn]:
            x, routes = [*args, *kwargs.values()][:2]
            for token, chosen in zip(x.double(), routes):
                for expert in chosen.tolist():
                    inner = _inner(module, token, expert, anatomy.model_type)
                    for name, a in ((first, token), (second, inner)):
                        total.setdefault(name, torch.zeros(e.number, len(a), len(a), dtype=torch.float64))
                        count.setdefault(name, torch.zeros(e.number, dtype=torch.long))
                        total[name][expert] += torch.outer(a, a)
                        count[name][expert] += 1
        module.float()
    return {n: t / count[n].clamp_min(1)[:, None, None] for n, t in total.items()}, count


def _inner(module, x, expert, family):
    if family == "gpt_oss":
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
    return F.silu(gate) * up


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts_see_what_the_router_sends_them(name, experts):
    model = build(name, experts=experts)
    anatomy = examine(model)
    wanted, count = plain(model, anatomy, documents())
    with torch.no_grad(), observe(model, anatomy) as seen:
        model(**rows(documents()))
    found = seen.statistics()
    assert wanted and all(0 in c.tolist() or len(set(c.tolist())) > 1 for c in count.values()), "routes are unequal"
    for weight, moment in wanted.items():
        assert_same(found[weight]["inputs"], moment, 2e-6, weight)
        assert found[weight]["tokens"].tolist() == count[weight].tolist()
    assert model.config._experts_implementation == experts
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_an_expert_without_a_token_has_nothing():
    model = build("qwen3_moe")
    anatomy = examine(model)
    with torch.no_grad(), observe(model, anatomy) as seen:
        model(input_ids=torch.tensor([[7]]))
    found = seen.statistics()["model.layers.0.mlp.experts.down_proj"]
    idle = found["tokens"] == 0
    assert found["tokens"].tolist().count(1) == 2 and idle.sum() == 2
    assert not found["inputs"][idle].any() and found["inputs"][~idle].any(-1).any(-1).all()


def test_company_for_other_ranks_counts_nothing():
    model = build("mixtral")
    anatomy = examine(model)
    made = tr.measure(model, [rows(documents()), silent()], anatomy=anatomy)
    assert made.digest == tr.measure(model, [rows(documents())], anatomy=anatomy).digest


def test_packed_documents_count_like_rows():
    model = build("qwen3_moe", experts="grouped_mm")
    anatomy = examine(model)
    apart = tr.measure(model, [rows(documents())], anatomy=anatomy)
    run = tr.compose(build("qwen3_moe", experts="grouped_mm"), [tr.Full()])
    together = tr.measure(run, [packed(documents())])
    for weight in apart:
        assert_same(together[weight]["inputs"], apart[weight]["inputs"], 2e-6, weight)
        assert together[weight]["tokens"].tolist() == apart[weight]["tokens"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_experts_that_are_stored_as_codes_are_measured_as_the_decoded_ones(name):
    quantize = tr.Quantize(format="int8")
    run = tr.compose(build(name), [quantize], frozen=True)
    plain = build(name)
    with torch.no_grad():
        decoded = dict(run.plain())
        for weight, parameter in plain.named_parameters():
            parameter.copy_(decoded[weight])
    wanted = tr.measure(plain, [rows(documents())])
    found = tr.measure(run, [rows(documents())])
    for weight, one in wanted.items():
        assert_same(found[weight]["inputs"], one["inputs"], 5e-6, weight)
        assert found[weight]["tokens"].tolist() == one["tokens"].tolist()


def test_experts_that_are_computed_another_way_are_refused():
    model = build("mixtral")
    anatomy = examine(model)
    module = model.model.layers[0].mlp.experts

    def at_once(x, routes, shares):
        both = torch.einsum("tm,enm->ten", x, module.gate_up_proj)
        gate, up = both.chunk(2, -1)
        out = torch.einsum("ten,emn->tem", F.silu(gate) * up, module.down_proj)
        return torch.einsum("tkm,tk->tm", torch.gather(out, 1, routes[..., None].expand(-1, -1, 32)), shares)

    module.forward = at_once
    with torch.no_grad(), observe(model, anatomy), pytest.raises(tr.PlanError, match="not understood"):
        model(**rows(documents()))
    assert module.forward is at_once


def test_experts_that_are_stored_otherwise_are_refused_with_a_way_out():
    model = build("mixtral")
    anatomy = examine(model)
    del model.model.layers[0].mlp.experts.down_proj
    with pytest.raises(tr.PlanError, match="treering measure"), observe(model, anatomy):
        pass
