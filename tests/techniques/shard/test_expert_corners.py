"""Experts assigned to ranks that also share a document, a gradient that is not finite on one owner, stored folders."""

import pytest
import torch
import torch.distributed as dist

import treering as tr
from tests.cut_rows import CutRows
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, packed, rows, weights
from tests.zoo import build
from treering.core.sharded import local
from treering.core.topology import data_rank


def shared(mesh):
    techniques = [tr.Full(), CutRows(how="documents"), *([tr.Shard()] if mesh else [])]
    run = tr.compose(build("qwen3_moe", dtype=torch.float64), techniques, mesh=tr.mesh(**mesh) if mesh else None)
    rank, ranks = data_rank(run.plan.mesh)
    batches = [packed((7, 3, 2, 5), seed=i) for i in range(2)]
    found = {name: value.clone() for name, value in gradients(run, batches[rank::ranks]).items()}
    norm = run.step(run.optimizer(torch.optim.SGD, lr=0.3), clip=0.05).norm
    return torch.tensor(norm), found, weights(run)


@pytest.mark.parametrize(("world", "expert"), [(2, 2), (4, 4)])
def test_ranks_of_one_document_share_experts_too(world, expert):
    wanted = shared(None)
    for found in on_ranks(world, shared, {"sequence": 2, "expert": expert}):
        assert_all_same({"norm": found[0]}, {"norm": wanted[0]}, 1e-6)
        assert_all_same(found[1], wanted[1], 1e-6)
        assert_all_same(found[2], wanted[2], 1e-6)


def guarded(owner):
    """Whether a step is skipped when only the experts of rank `owner` have a gradient that is not finite."""
    run = tr.compose(build("qwen3_moe"), [tr.Full(), tr.Shard()], mesh=tr.mesh(expert=2))
    gradients(run, rows(4)[dist.get_rank() :: 4])
    before = {name: local(p).clone() for name, p in run.trainable()}
    if dist.get_rank() == owner:
        local(dict(run.trainable())["model.layers.1.mlp.experts.down_proj"].grad)[0, 0, 0] = float("nan")
    report = run.step(run.optimizer(torch.optim.SGD, lr=0.3), clip=1.0)
    same = all(torch.equal(local(p), before[name]) for name, p in run.trainable())
    return report.skipped, same


@pytest.mark.parametrize("owner", [0, 3])
def test_a_gradient_that_is_not_finite_on_one_owner_skips_the_step_everywhere(owner):
    assert on_ranks(4, guarded, owner) == [(True, True)] * 4
