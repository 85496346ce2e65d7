"""Inside FSDP units, under compile, on one rank and on two: equal to a single plain process."""

from collections import Counter
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, packed, rows
from tests.zoo import build
from treering.core.sharded import local
from treering.core.topology import data_rank
from treering.techniques.recompute import Recompute

OURS = Recompute(offload="cpu")
LEARNS = {"full": tr.Full(), "lora": tr.LoRA(rank=2, targets=("q_proj", "down_proj"))}


class Messages(TorchDispatchMode):
    """Counts FSDP's collectives."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        space, _, name = op.name().partition("::")
        if space == "c10d" and name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.count[name] += 1
        return op(*args, **(kwargs or {}))


def measured(learns, techniques, batches, arch="llama"):
    run = tr.compose(build(arch), [LEARNS[learns], *techniques])
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith(".B"):
                local(parameter).fill_(0.01)
    rank, ranks = data_rank(run.plan.mesh)
    with Messages() as messages:
        found = gradients(run, batches[rank::ranks])
    return found, dict(messages.count)


BATCHES = {"rows": rows(4), "packed": [packed((7, 5, 4)), packed((9, 7), seed=1)]}
CASES = {  # techniques, and the one beside which the numbers of messages are compared
    "recompute": ([Recompute(), tr.Shard()], tr.Shard()),
    "offloaded": ([OURS, tr.Shard()], tr.Shard()),
    "kept": ([Recompute(keep=("attention",), offload="cpu"), tr.Shard()], tr.Shard()),
    "gathered once": ([OURS, tr.Shard(reshard=False)], tr.Shard(reshard=False)),
    "parameters on the cpu": ([OURS, tr.Shard(offload="cpu")], tr.Shard(offload="cpu")),
}


def all_cases(learns):
    """One after the other in the same processes: starting them costs more than a case."""
    before = cache(lambda name, shard: measured(learns, [shard], BATCHES[name])[1])
    return {
        (case, name): (measured(learns, ours, batches), before(name, without))
        for case, (ours, without) in CASES.items()
        for name, batches in BATCHES.items()
        if name == "rows" or case in ("offloaded", "kept")
    }


@pytest.mark.parametrize(
    "world, learns", [(2, "full"), (2, "lora"), (1, "full"), pytest.param(1, "lora", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_one_process_and_no_message_is_added(world, learns):
    wanted = {name: measured(learns, [], batches)[0] for name, batches in BATCHES.items()}
    for results in on_ranks(world, all_cases, learns):
        for (case, name), ((found, messages), before) in results.items():
            assert_all_same(found, wanted[name], 1e-6)
            assert messages == before, case


def pinned_cases():
    shard = tr.Shard(compute="bfloat16")
    return [measured("lora", [*ours, shard], BATCHES["rows"]) for ours in ([], [OURS])]


def test_adapters_with_units_of_their_own_inside_a_block():
    for (wanted, before), (found, messages) in on_ranks(2, pinned_cases):
        assert_all_same(found, wanted)
        assert messages["_reduce_scatter_base_"] == before["_reduce_scatter_base_"]


def each_of(architectures):
    return [measured("full", [OURS, tr.Shard()], BATCHES["rows"], arch)[0] for arch in architectures]


def test_experts_and_tied_embeddings_on_two_ranks():
    architectures = ("qwen3_moe", "gpt2")
    for results in on_ranks(2, each_of, architectures):
        for arch, found in zip(architectures, results):
            assert_all_same(found, measured("full", [], BATCHES["rows"], arch)[0], 1e-6)


def test_compiled_blocks_are_compiled_in_both_passes():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batches = rows(4)  # of several lengths: torch compiles again, and then for all lengths
    wanted, _ = measured("full", [], batches)
    run = tr.compose(build("llama"), [tr.Full(), OURS])
    for block in run.model.model.layers:
        block.compile(backend=backend)
    assert_all_same(gradients(run, batches), wanted, 1e-6)
    assert graphs, "nothing was compiled"
    before = len(graphs)
    gradients(run, batches)
    assert len(graphs) == before


@pytest.mark.parametrize("learns", LEARNS)
def test_with_aot_eager_gradients_are_eagers_and_undo_takes_both_off(learns):
    torch._dynamo.reset()
    wanted, _ = measured(learns, [], BATCHES["packed"])
    compiled = tr.Compile(backend="aot_eager")
    found, _ = measured(learns, [OURS, compiled], BATCHES["packed"])
    assert_all_same(found, wanted, 1e-6)
    run = tr.compose(build("llama"), [tr.Full(), OURS, compiled])
    blocks = list(run.model.model.layers)
    assert all(block.forward.compiled is not None and block._compiled_call_impl is not None for block in blocks)
    run.undo()
    assert not any({"forward", "compile"} & set(vars(block)) or block._compiled_call_impl for block in blocks)


def test_compiled_and_sharded_on_two_ranks():
    wanted, _ = measured("full", [], BATCHES["packed"])
    techniques = [OURS, tr.Compile(backend="aot_eager"), tr.Shard()]
    for found, _ in on_ranks(2, measured, "full", techniques, BATCHES["packed"]):
        assert_all_same(found, wanted, 1e-6)
