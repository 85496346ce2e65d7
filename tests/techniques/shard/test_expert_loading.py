"""A rank reads its own experts alone, also where they cannot be sharded evenly; and what is gathered is complete."""

import pytest

import treering as tr
from tests.plan.test_independent_rows import one_expert, stacked, watched
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.skips import sharded_codes
from tests.toy import gradients, rows
from treering.core.sharded import gather, local_rows
from treering.core.topology import data_rank
from treering.plan import draft, load

TECHNIQUES = {
    "full": [tr.Full()],
    "lora": [tr.LoRA(rank=2, targets=("*.experts.*",))],
    "packed": [tr.LoRA(rank=2, targets=("q_proj", "down_proj")), tr.Quantize(format="int8", targets=("*.experts.*",))],
}


def loaded(folder, case, mesh):
    """Every live tensor, gathered; of each stack the rows that were read and those stored; and the gradients."""
    sharded = [tr.Shard()] if mesh else []
    plan = draft(folder, [*TECHNIQUES[case], *sharded], mesh=tr.mesh(**mesh) if mesh else None)
    plan, counted, alive = watched(plan)
    run = load(plan)
    live = run.plan.live()
    stored = {}
    for name in counted:
        like = name if name in live else f"{name.rpartition('.')[0]}.packed_{name.rpartition('.')[2]}.codes"
        stored[name] = local_rows(live[like])
    read = {name: (sorted(set(tensor.rows_read)), stored[name]) for name, tensor in counted.items()}
    values = {name: gather(value).clone() for name, value in live.items()}
    rank, ranks = data_rank(run.plan.mesh)
    return values, read, alive["most"], gradients(run, rows(4)[rank::ranks])


CASES = [("full", 6, 4), ("lora", 2, 4), pytest.param("packed", 6, 4, marks=sharded_codes)]


@pytest.mark.parametrize(("case", "experts", "world"), CASES)
def test_a_rank_reads_its_own_experts(case, experts, world, tmp_path):
    folder = stacked("qwen3_moe", tmp_path / "m", experts)
    wanted, *_, gradient = loaded(folder, case, None)
    spans = set()
    for found, read, most, its_gradient in on_ranks(world, loaded, folder, case, {"expert": 2}):
        assert_all_same(found, wanted)
        assert_all_same(its_gradient, gradient, 2e-5)
        assert most <= one_expert("qwen3_moe", folder)
        for name, (seen, (start, stop)) in read.items():
            assert seen == list(range(start, stop)), name
            spans.add((start, stop))
    assert spans == ({(0, 2), (2, 3), (3, 5), (5, 6)} if experts == 6 else {(0, 1), (1, 1), (1, 2), (2, 2)})
