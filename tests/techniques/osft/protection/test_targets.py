"""How many directions are free: by ratio, by pattern, by energy, by importance; explicit once resolved."""

from dataclasses import replace

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.techniques.osft.measured import moments
from tests.zoo import build
from treering.anatomy import examine
from treering.techniques.osft.protection.targets import targets, trainable


def counted(config, arch="llama"):
    return {t.weight: trainable(config, t) for t in targets(config, examine(build(arch)))}


def test_a_ratio_is_of_the_rank_or_of_the_inputs():
    down = "model.layers.0.mlp.down_proj.weight"  # 32 × 48
    assert counted(tr.OSFT(protect="weights", ratio=0.3))[down] == int(0.3 * 32)
    assert counted(tr.OSFT(protect="inputs", ratio=0.3))[down] == int(0.3 * 48)
    assert counted(tr.OSFT(protect="weights", ratio=0.1, ratios={"down_proj": 0.5}))[down] == 16
    assert counted(tr.OSFT(protect="weights", ratio=0.1, ratios={"model.layers.1.*": 1.0}))[down] == 3


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.57, 0.7])
def test_binary_fractions_do_not_lose_a_direction(ratio):
    config = tr.OSFT(protect="weights", ratio=ratio, targets=("q_proj",))
    assert set(counted(config).values()) == {int(round(ratio * 100) * 32 // 100)}


def resolved(config, arch="llama"):
    model = build(arch)
    statistics = moments(model, config)
    return tr.compose(model, [config], statistics=statistics).plan.techniques[0], statistics, build(arch)


@pytest.mark.parametrize("protect", ["weights", "inputs", "both"])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_energy_keeps_the_fewest_directions_that_hold_it(protect, arch):
    config, statistics, model = resolved(tr.OSFT(protect=protect, rank="energy", energy=0.6), arch)
    for target in targets(config, examine(model)):
        if protect == "weights":
            energy = torch.linalg.svdvals(model.get_parameter(target.weight).detach().double()).square()
        else:
            energy = torch.linalg.eigvalsh(statistics[target.weight]["inputs"]).flip(-1)
        kept = energy.shape[-1] - config.free[target.weight]
        share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
        assert bool((share[..., kept - 1] >= 0.6).all())
        assert bool((share[..., kept - 2] < 0.6).any())


def test_all_of_the_energy_is_everything():
    with pytest.raises(tr.PlanError, match="no target has a trainable direction"):
        resolved(tr.OSFT(protect="weights", rank="energy", energy=1.0))


def test_importance_is_the_papers_where_inputs_and_outputs_are_as_many():
    config, statistics, model = resolved(
        tr.OSFT(protect="weights", rank="importance", targets=("q_proj", "up_proj"), importance=(0.1, 0.6))
    )
    cosines = {}
    for target in targets(config, examine(model)):
        W = target.oriented(model.get_parameter(target.weight).detach().double())
        A = statistics[target.weight]["inputs"]
        T = torch.eye(32, dtype=torch.float64)
        if target.inputs != target.outputs:
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            T = U @ Vh
        top = torch.trace(T.mT @ W @ A)
        cosines[target.weight] = float((top / (torch.trace(T @ A @ T.mT) * torch.trace(W @ A @ W.mT)).sqrt()).clamp(0))
    mean = sum(cosines.values()) / len(cosines)
    for name, cosine in cosines.items():
        kept = int(min(1.0, 0.1 + cosine / mean * 0.5) * 32 + 1e-9)
        assert config.free[name] == 32 - kept
    assert len(set(config.free.values())) > 1


def on_two(folder):
    config = tr.OSFT(protect="both", rank="energy", energy=0.8)
    model = build("llama")
    statistics = moments(model, config)
    run = tr.compose(model, [config, tr.Shard()], mesh=tr.mesh(), prepared=folder, statistics=statistics)
    return run.plan.techniques[0].free


def test_ranks_agree_on_ranks_whoever_counted_them(tmp_path):
    alone, _, _ = resolved(tr.OSFT(protect="both", rank="energy", energy=0.8))
    assert on_ranks(2, on_two, tmp_path) == [alone.free, alone.free]


def test_a_resolved_technique_is_not_resolved_again():
    config, statistics, model = resolved(tr.OSFT(protect="inputs", rank="energy", energy=0.8))
    again = tr.compose(model, [replace(config, energy=0.1)], statistics=statistics).plan.techniques[0]
    assert again.free == config.free
