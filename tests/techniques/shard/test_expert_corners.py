"""Experts assigned to ranks that also share a document, a gradient that is not finite on one owner, stored folders."""

import pytest
import torch
import torch.distributed as dist

import treering as tr
from tests.cut_rows import CutRows
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.skips import sharded_codes
from tests.toy import gradients, packed, rows, weights
from tests.weights import folders
from tests.weights.folders import WRITERS, published
from tests.zoo import build, save
from treering.core.sharded import gather, local
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


def opened(folder, techniques, mesh, prepared):
    """Every tensor of a folder that is opened with its bits kept, gathered, and the gradients of adapters."""
    run = tr.compose(
        folder,
        [*techniques, *([tr.Shard()] if mesh else [])],
        mesh=tr.mesh(**mesh) if mesh else None,
        prepared=prepared,
    )
    live = {name: gather(value).clone() for name, value in run.plan.live().items()}
    rank, ranks = data_rank(run.plan.mesh)
    return live, gradients(run, rows(4)[rank::ranks])


@sharded_codes
@pytest.mark.parametrize("name", ["gpt_oss", "nvfp4"])
def test_a_stored_folder_is_opened_with_its_bits_on_the_ranks_that_own_them(name, tmp_path):
    path = tmp_path / "m"
    folder = folders.gpt_oss(path) if name == "gpt_oss" else published("qwen3_moe", path, WRITERS[name])
    techniques = [tr.LoRA(rank=2, targets="all-linear")]
    wanted, gradient = opened(folder, techniques, None, None)
    assert any(".packed_" in key and value.dtype == torch.uint8 for key, value in wanted.items())
    for found, its_gradient in on_ranks(4, opened, folder, techniques, {"expert": 2}, None):
        assert_all_same(found, wanted)
        assert_all_same(its_gradient, gradient, 1e-5)


@sharded_codes
@pytest.mark.slow
def test_a_start_from_the_residual_is_that_of_one_process(tmp_path):
    folder = save("qwen3_moe", tmp_path / "m")
    techniques = [tr.LoRA(rank=2, targets="all-linear", init="residual"), tr.Quantize(format="int8")]
    wanted, gradient = opened(folder, techniques, None, tmp_path / "one")
    for found, its_gradient in on_ranks(4, opened, folder, techniques, {"expert": 2}, tmp_path / "four"):
        assert_all_same(found, wanted, 1e-5)
        assert_all_same(its_gradient, gradient, 1e-4)


def undone(mesh):
    """The loss of a run that takes its tiles and adapters out of the forward."""
    techniques = [tr.LoRA(rank=2, targets="all-linear"), tr.TiledMLP(tile=3)] if mesh else [tr.Full()]
    run = tr.compose(
        build("qwen3_moe", dtype=torch.float64),
        [*techniques, *([tr.Shard()] if mesh else [])],
        mesh=tr.mesh(**mesh) if mesh else None,
    )
    with torch.no_grad():
        for _, parameter in run.trainable() if mesh else ():
            local(parameter).fill_(0.1)
    rank, ranks = data_rank(run.plan.mesh)
    [ready] = run.steps([rows(4)[rank::ranks]])
    losses = []
    for take_out in (True, False) if mesh else (False,):
        with torch.no_grad():
            losses.append(run.total(sum(run.loss(batch) for batch in ready)))
        if take_out:
            run.undo()
    return torch.stack(losses).double()


def test_tiles_and_adapters_are_undone_beneath_the_exchange():
    wanted = undone(None)
    for found in on_ranks(2, undone, {"expert": 2}):
        assert abs(float(found[0] - wanted[0])) > 1e-3
        assert_all_same({"loss": found[1]}, {"loss": wanted[0]}, 1e-6)
