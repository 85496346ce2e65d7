"""What a rank needs that has some of the experts, traced from shapes as if its tokens chose all equally often."""

from dataclasses import replace

import pytest
import torch

import treering as tr
from tests.plan.memory_toys import moe, subject
from tests.skips import sharded_codes
from treering.core.topology import mesh
from treering.memory import forecast, pretend

MODEL = moe(num_experts=16, num_experts_per_tok=4, num_hidden_layers=2, moe_intermediate_size=256)
STACKS = 2 * 16 * (3 * 64 * 256) * 4  # bytes


def foreseen(techniques, expert, **settings):
    run = subject(MODEL, techniques, world=8, **settings)
    run = replace(run, mesh=lambda: mesh(expert=expert, device=pretend.NAME))
    peak = forecast(run, 400).at(400)
    return {c: max(by[c] for by in peak.phases.values()) for c in next(iter(peak.phases.values()))}


def test_a_rank_stores_its_share_and_gathers_no_experts_of_others():
    without, some, own = (foreseen([tr.Full(), tr.Shard()], expert) for expert in (1, 2, 8))
    for category in ("parameters", "optimizer"):
        assert without[category] == some[category] == own[category] > STACKS / 8
    assert without["gathered"] > STACKS  # the experts of one block and those of the next
    assert STACKS / 2 < some["gathered"] < without["gathered"] / 1.9
    assert own["gathered"] < without["gathered"] / 8


@sharded_codes
@pytest.mark.parametrize("techniques", [[], [tr.Quantize(format="nvfp4")], [tr.TiledMLP(tile=64), tr.Recompute()]])
def test_adapters_packed_bases_and_tiles_are_traced(techniques):
    lora = tr.LoRA(rank=8, targets="all-linear", dtype="float32")
    found = foreseen([lora, *techniques, tr.Shard(compute="bfloat16")], 4, dtype=torch.bfloat16)
    assert all(found[category] > 0 for category in ("technique", "gradients", "optimizer"))
    assert found["optimizer"] == pytest.approx(2 * found["gradients"], rel=0.5)
