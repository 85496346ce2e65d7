"""Any dealing of one global batch to ranks and micro-batches trains the same model."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import rows, train, weights
from tests.zoo import build

TECHNIQUES = {
    "full": [tr.Full()],
    "lora": [tr.LoRA(rank=4, alpha=8.0)],
    "lora and norms": [tr.LoRA(rank=4, targets=("q_proj", "down_proj")), tr.Full(train=("*norm*",))],
    "two adapters": [tr.LoRA(rank=4, name="one"), tr.LoRA(rank=2, name="two", targets=("v_proj",), rslora=True)],
    "pissa": [tr.LoRA(rank=4, init="pissa")],
}


def dealt(rank: int, world: int, uneven: bool = False) -> list[list[dict]]:
    """Three steps of 6 micro-batches, the last of 3: the same global batch for every number of ranks."""
    steps = [rows(6, seed=0), rows(6, seed=1), rows(3, seed=2)]
    return [[b for i, b in enumerate(step) if (min(i, world - 1) if uneven else i % world) == rank] for step in steps]


def trained(case, world, kind, arch, dtype, folder, uneven=False, sharding=None):
    import torch.distributed as dist

    from treering.core.topology import data_rank

    techniques = list(TECHNIQUES[case])
    mesh = None
    if world > 1 or sharding is not None:
        mesh = tr.mesh(**(sharding or {"shard": -1}))
        techniques.append(tr.Shard())
    if dtype == torch.float64:
        techniques = [
            tr.LoRA(**{**t.__dict__, "dtype": "float64"}) if isinstance(t, tr.LoRA) else t for t in techniques
        ]
    run = tr.compose(build(arch, dtype=dtype), techniques, mesh=mesh, prepared=folder)
    rank, ranks = data_rank(mesh)
    if kind is torch.optim.SGD:
        settings = {"lr": 0.5}
    else:
        settings = {"lr": 1e-2, "weight_decay": 0.1}
    losses = train(run, dealt(rank, ranks, uneven), kind, **settings)
    if world > 1:
        shared = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(shared)
        losses = shared.tolist()
    return losses, weights(run)


@pytest.mark.parametrize("case", TECHNIQUES)
def test_two_ranks_train_like_one(case, tmp_path):
    losses, wanted = trained(case, 1, torch.optim.SGD, "llama", torch.float32, tmp_path)
    for losses_of_rank, parameters in on_ranks(2, trained, case, 2, torch.optim.SGD, "llama", torch.float32, tmp_path):
        assert losses_of_rank == pytest.approx(losses, rel=1e-6)
        assert_all_same(parameters, wanted, 1e-6)


@pytest.mark.parametrize("case", ["full", "lora"])
@pytest.mark.parametrize("world", [3, 4])
def test_adamw_in_fp64_on_three_and_four_ranks(case, world, tmp_path):
    _, wanted = trained(case, 1, torch.optim.AdamW, "llama", torch.float64, tmp_path)
    for _, parameters in on_ranks(world, trained, case, world, torch.optim.AdamW, "llama", torch.float64, tmp_path):
        assert_all_same(parameters, wanted, 1e-10)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3_moe", "gemma2", "gpt_oss"])
def test_other_architectures_tied_and_mixed(arch, tmp_path):
    _, wanted = trained("full", 1, torch.optim.SGD, arch, torch.float32, tmp_path)
    _, parameters = on_ranks(2, trained, "full", 2, torch.optim.SGD, arch, torch.float32, tmp_path)[0]
    assert_all_same(parameters, wanted, 1e-6)


def test_a_rank_with_fewer_micro_batches_runs_empty_ones(tmp_path):
    _, wanted = trained("full", 1, torch.optim.SGD, "llama", torch.float32, tmp_path)
    _, parameters = on_ranks(2, trained, "full", 2, torch.optim.SGD, "llama", torch.float32, tmp_path, True)[0]
    assert_all_same(parameters, wanted, 1e-6)


@pytest.mark.parametrize("sharding", [{"replicate": 2, "shard": 2}, {"replicate": -1, "shard": 1}], ids=str)
def test_hybrid_and_plain_replication(sharding, tmp_path):
    _, wanted = trained("lora and norms", 1, torch.optim.AdamW, "llama", torch.float64, tmp_path)
    for _, parameters in on_ranks(
        4, trained, "lora and norms", 4, torch.optim.AdamW, "llama", torch.float64, tmp_path, False, sharding
    ):
        assert_all_same(parameters, wanted, 1e-10)


def test_sharding_on_one_rank_without_a_launcher_changes_nothing(tmp_path):
    _, wanted = trained("full", 1, torch.optim.SGD, "llama", torch.float32, tmp_path)
    [(_, parameters)] = on_ranks(
        1, trained, "full", 1, torch.optim.SGD, "llama", torch.float32, tmp_path, False, {"shard": 1}
    )
    assert_all_same(parameters, wanted, 0.0)
