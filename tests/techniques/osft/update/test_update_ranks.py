"""Form `update` and the adapters on several ranks train like one process; the bases are dealt out, and come back."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.techniques.osft.measured import moments
from tests.toy import rows, train, weights
from tests.zoo import build

CONFIGS = {
    "weights": tr.OSFT(protect="weights", ratio=0.3, keep_initial=True),
    "inputs": tr.OSFT(form="update"),
    "inputs, a tail": tr.OSFT(ratio=0.4, form="update"),
    "both": tr.OSFT(protect="both", strength="hard", ratio=0.3),
    "almost closed": tr.OSFT(protect="weights", ratio=0.05),  # one free direction: most ranks hold no row of it
    "almost open": tr.OSFT(protect="weights", ratio=0.97),
    "frozen experts": tr.OSFT(unmeasured="freeze", form="update"),
    "one_sided": tr.OSFT(protect="both", ratio=0.3, form="one_sided"),
    "core": tr.OSFT(protect="weights", ratio=0.3, form="core"),
}


def trained(case, arch, sharding, folder, dtype=torch.float64, compute="stored"):
    config = CONFIGS[case]
    model = build(arch, dtype=dtype)
    statistics = moments(model, config)
    if config.unmeasured == "freeze" and arch == "qwen3_moe":
        for found in statistics.values():
            if found["inputs"].ndim == 3:
                found["inputs"][[0, 3]] = 0.0
    mesh = tr.mesh(**sharding) if sharding is not None else None
    techniques = [config] if mesh is None else [config, tr.Shard(compute=compute)]
    run = tr.compose(model, techniques, mesh=mesh, prepared=folder, statistics=statistics)
    from treering.core.topology import data_rank

    rank, ranks = data_rank(mesh)
    steps = [rows(4, seed=i)[rank::ranks] for i in range(3)]
    train(run, steps, torch.optim.AdamW, lr=1e-2, weight_decay=0.1 if config.keep_initial else 0.0)
    return weights(run), run.metrics()


@pytest.mark.parametrize("case", CONFIGS)
def test_two_ranks_train_like_one(case, tmp_path):
    wanted, metrics = trained(case, "llama", None, tmp_path)
    for found, others in on_ranks(2, trained, case, "llama", {"shard": -1}, tmp_path):
        assert_all_same(found, wanted, 1e-9)
        assert others == pytest.approx(metrics, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "arch", "sharding"),
    [
        ("weights", "llama", {"shard": 3}),
        ("both", "llama", {"shard": 4}),
        ("weights", "llama", {"replicate": 2, "shard": 2}),
        ("inputs", "llama", {"replicate": 2, "shard": 1}),
        ("one_sided", "llama", {"shard": 3}),
        ("one_sided", "qwen3_moe", {"shard": 3}),
    ],
    ids=str,
)
def test_every_mesh_trains_like_one(case, arch, sharding, tmp_path):
    wanted, _ = trained(case, arch, None, tmp_path)
    world = sharding["shard"] * sharding.get("replicate", 1)
    for found, _ in on_ranks(world, trained, case, arch, sharding, tmp_path):
        assert_all_same(found, wanted, 1e-9)


@pytest.mark.parametrize(
    ("case", "arch"),
    [("both", "gpt2"), ("weights", "qwen3_moe"), ("inputs", "qwen3_moe"), ("frozen experts", "qwen3_moe")],
)
def test_stored_the_other_way_round_and_stacked(case, arch, tmp_path):
    wanted, _ = trained(case, arch, None, tmp_path)
    for found, _ in on_ranks(2, trained, case, arch, {"shard": -1}, tmp_path):
        assert_all_same(found, wanted, 1e-9)


def in_half(case, folder):
    config = CONFIGS[case]
    model = build("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    statistics = moments(model, config)
    run = tr.compose(
        model, [config, tr.Shard(compute="bfloat16")], mesh=tr.mesh(shard=-1), prepared=folder, statistics=statistics
    )
    train(run, [rows(1, seed=i) for i in range(20)], torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    after = weights(run)
    leaks = []
    for name in before:
        if "q_proj" not in name:
            continue
        U, _, _ = torch.linalg.svd(before[name].double())
        change = (after[name] - before[name]).double()
        held = U.shape[0] - int(0.3 * U.shape[0] + 1e-9)
        leaks.append(float((U[:, :held].mT @ change).norm() / change.norm()))
    return max(leaks)


@pytest.mark.parametrize("case", ["core"])
def test_bfloat16_arithmetic_does_not_leak(case, tmp_path):
    assert max(on_ranks(2, in_half, case, tmp_path)) < 1e-5


def dealt(folder):
    config = replace(CONFIGS["weights"], ratio=0.6)
    run = tr.compose(build("llama"), [config, tr.Shard()], mesh=tr.mesh(shard=-1), prepared=folder)
    live = run.plan.live()
    bases = {n: v for n, v in live.items() if n.rpartition(".")[2].startswith(("Q_", "before"))}
    assert bases and all(isinstance(v, DTensor) for v in bases.values())
    assert set(bases) < set(run.plan.owned)
    return sum(v.to_local().numel() for v in bases.values()), sum(v.numel() for v in bases.values())


def test_no_rank_holds_all_bases(tmp_path):
    found = on_ranks(2, dealt, tmp_path)
    assert sum(mine for mine, _ in found) == found[0][1]


def split_once(folder):
    from treering.techniques.osft.protection import operators

    counted = []
    whole = operators.svd
    operators.svd = lambda W: (counted.append(1), whole(W))[1]
    for _ in range(2):
        tr.compose(build("llama"), [CONFIGS["weights"], tr.Shard()], mesh=tr.mesh(shard=-1), prepared=folder)
    operators.svd = whole
    return len(counted)


def test_each_weight_is_decomposed_once_by_one_rank(tmp_path):
    assert sum(on_ranks(2, split_once, tmp_path)) == 14
