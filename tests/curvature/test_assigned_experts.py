"""Experts that are assigned to ranks are measured where they are, and padding of other ranks' tokens is known there."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.toy import rows
from tests.zoo import build
from treering.core.topology import data_rank


def batches():
    """Rows of which some have padding: on two ranks, one has padding and the other has none."""
    found = []
    for i, batch in enumerate(rows(4)):
        real = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
        if i % 2:
            real[:, -2:] = False
        found.append({"input_ids": batch["input_ids"], "real": real})
    return found


def measured(mesh, techniques):
    sharded = [tr.Shard()] if mesh else []
    run = tr.compose(build("qwen3_moe"), [*techniques, *sharded], mesh=tr.mesh(**mesh) if mesh else None, frozen=True)
    rank, ranks = data_rank(run.plan.mesh)
    known = tr.measure(run, batches()[rank::ranks])
    return {name: (known[name]["inputs"], torch.tensor(known.entries[name].tokens)) for name in known}


@pytest.mark.parametrize(("world", "mesh"), [(2, {"expert": 2}), (4, {"expert": 2})])
def test_moments_and_counts_are_those_of_one_process(world, mesh):
    wanted = measured(None, [])
    assert any(tokens.numel() > 1 and len(set(tokens.tolist())) > 1 for _, tokens in wanted.values())
    for found in on_ranks(world, measured, mesh, []):
        assert found.keys() == wanted.keys()
        for name, (moment, tokens) in wanted.items():
            assert torch.equal(found[name][1], tokens), name
            assert_same(found[name][0], moment, 1e-6, name)


def tiled():
    with pytest.raises(tr.PlanError, match="measure a run without tiledmlp"):
        measured({"expert": 2}, [tr.TiledMLP(tile=3)])
    return True


def test_tiles_of_assigned_experts_are_not_measured():
    assert on_ranks(2, tiled) == [True, True]
