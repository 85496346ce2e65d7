"""A loss is a sum over trained tokens / their global number, on every mesh: trained, reported and held-out."""

import pytest
import torch
import torch.distributed as dist

import treering as tr
from tests.cut_rows import CutRows
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import packed, weights
from tests.zoo import build
from treering.core.topology import data_rank
from treering.train.evaluate import held_out_loss

MESHES = [
    {"shard": 2},
    {"replicate": 2, "shard": 1},
    {"shard": 1, "sequence": 2},
    {"shard": 2, "sequence": 2},
    {"replicate": 2, "shard": 2},
    {"replicate": 2, "shard": 1, "sequence": 2},
]
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-10}


def micro_batches(step):
    """Four packed rows of documents of unequal length, whose numbers of trained tokens differ."""
    rows = [packed((7, 3, 2, 5), seed=10 * step + i) for i in range(4)]
    for i, row in enumerate(rows):
        row["labels"][:, : 1 + 2 * i] = -100
    return rows


class HeldOut:
    """A loader: its batches know their count, and each rank takes its share."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks

    def once(self):
        for step in (7, 8):
            batches = micro_batches(step)
            count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
            yield [{**batch, "count": count} for batch in batches[self.rank :: self.ranks]]


def counted_by_itself(run, batches, sizes):
    """A loop without run.steps: its batches have labels and a count that it has summed over the ranks."""
    count = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
    if sizes:
        dist.all_reduce(count)
    return sum(run.loss({**batch, "count": int(count)}).detach().double() for batch in batches)


def losses(sizes, dtype, how, counted):
    """Of two steps as this rank reports them and as its own loop sums them, on held-out text; weights at the end."""
    mesh = tr.mesh(**sizes) if sizes else None
    cut = [CutRows(how=how)] if how else []
    techniques = [tr.Full(), *([tr.Shard()] if sizes else []), *cut]
    run = tr.compose(build("llama", dtype=dtype), techniques, mesh=mesh)
    rank, ranks = data_rank(mesh)
    optimizer = run.optimizer(torch.optim.SGD, lr=0.5)
    held_out = [held_out_loss(run, HeldOut(rank, ranks))]
    reported, summed = [], []
    loader = list(HeldOut(rank, ranks).once()) if counted else [micro_batches(s)[rank::ranks] for s in (7, 8)]
    for batches in run.steps(loader):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = run.loss(batch)
            loss.backward()
            total += loss.detach()
        run.step(optimizer)
        reported.append(float(run.total(total)))
        if sizes:
            dist.all_reduce(total)
        summed.append(float(total))
    held_out.append(held_out_loss(run, HeldOut(rank, ranks)))
    if how is None:
        reported.append(float(run.total(counted_by_itself(run, micro_batches(9)[rank::ranks], sizes))))
    return reported, summed, held_out, weights(run)


def compare(sizes, dtype, how, counted):
    world = torch.Size(sizes.values()).numel()
    wanted = losses({}, dtype, None, counted)
    for got in on_ranks(world, losses, sizes, dtype, how, counted):
        for values, others in zip(got[:3], wanted[:3]):
            assert values == pytest.approx(others[: len(values)], rel=DTYPES[dtype])
        assert_all_same(got[3], wanted[3], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_on_a_mesh_are_those_of_one_process(sizes, dtype):
    how = "documents" if "sequence" in sizes else None
    compare(sizes, dtype, how, counted=dtype == torch.float64)


@pytest.mark.parametrize("how", ["targets", "copies"])
def test_ranks_along_a_sequence_may_hold_the_same_tokens_or_other_ones(how):
    compare({"shard": 2, "sequence": 2}, torch.float64, how, counted=False)


def lost_targets():
    mesh = tr.mesh(shard=1, sequence=2)
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard(), CutRows(how="lost")], mesh=mesh)
    with pytest.raises(tr.PlanError, match=r"6 trained tokens.*3 of them on the ranks"):
        next(run.steps([[packed((4, 4))]]))


def test_a_technique_that_loses_targets_on_its_way_is_refused():
    on_ranks(2, lost_targets)


def other_documents():
    mesh = tr.mesh(shard=1, sequence=2)
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard(), CutRows(how="documents")], mesh=mesh)
    own = packed((4, 4) if dist.get_rank() == 0 else (5, 6))
    with pytest.raises(tr.DataError, match=r"sequence.*the same micro-batches.*data_rank"):
        next(run.steps([[own]]))


def test_other_documents_along_a_sequence_are_refused():
    on_ranks(2, other_documents)
