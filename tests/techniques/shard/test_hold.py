"""What stays whole within a step: fewer messages, the same numbers, and no step with half of its gradients."""

import os
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, rows, train, weights
from tests.zoo import build
from treering.core.sharded import local
from treering.core.topology import data_rank

LEARNS = {
    "full": tr.Full(),
    "lora": tr.LoRA(rank=2, targets=("q_proj", "down_proj")),
    "norms": tr.Full(train=("*norm*",)),
}
STEPS = [rows(6), rows(4, seed=1)]
GATHERS, SUMS = "_allgather_base_", "_reduce_scatter_base_"


class Messages(TorchDispatchMode):
    """Counts FSDP's collectives."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name().startswith("c10d::"):
            self.count[op.name().partition("::")[2]] += 1
        return op(*args, **(kwargs or {}))


def trained(learns, settings):
    """(weights after two steps, messages of another step's three micro-batches)."""
    run = tr.compose(build("llama"), [LEARNS[learns], *([tr.Shard(**settings)] if settings else [])])
    rank, ranks = data_rank(run.plan.mesh)
    train(run, [step[rank::ranks] for step in STEPS], torch.optim.SGD, lr=0.2)
    found = weights(run)
    with Messages() as messages:
        [ready] = run.steps([rows(6, seed=2)[rank::ranks]])
        for batch in ready:
            run.loss(batch).backward()
        run.step(run.optimizer(torch.optim.SGD, lr=0.2))
    return found, messages.count


SETTINGS = {
    "gradients": {"hold": "gradients"},
    "all": {"hold": "all"},
    "all, resting on the cpu": {"hold": "all", "offload": "cpu"},
    "gradients, never resharded": {"hold": "gradients", "reshard": False},
}


def all_settings(learns):
    return {name: trained(learns, settings) for name, settings in SETTINGS.items()} | {
        "nothing": trained(learns, {"hold": "nothing"})
    }


@pytest.mark.parametrize("learns", LEARNS)
def test_two_ranks_train_like_one_whatever_is_held(learns):
    wanted, _ = trained(learns, None)
    for results in on_ranks(2, all_settings, learns):
        for found, _ in results.values():
            assert_all_same(found, wanted, 1e-6)
        usual, gradients_, everything = (results[name][1] for name in ("nothing", "gradients", "all"))
        assert gradients_[SUMS] * 3 == usual[SUMS] == everything[SUMS] * 3
        assert gradients_[GATHERS] == usual[GATHERS]
        assert everything[GATHERS] == 5, "each unit once: two blocks, embedding, head, root"


def alone():
    return [trained("full", settings)[0] for settings in SETTINGS.values()]


def test_one_rank_as_well():
    wanted, _ = trained("full", None)
    [found] = on_ranks(1, alone)
    for each in found:
        assert_all_same(each, wanted, 1e-6)


def halved(hold):
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard(compute="bfloat16", hold=hold)])
    return gradients(run, rows(8)[torch.distributed.get_rank() :: 2])


def test_gradients_of_bfloat16_arithmetic_are_added_up_in_float32():
    for held, usual in zip(on_ranks(2, halved, "gradients"), on_ranks(2, halved, "nothing")):
        assert_all_same(held, usual, 1e-6)


def taken_ahead():
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard(hold="gradients")])
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    first, _second = list(run.steps([rows(2), rows(2, seed=1)]))
    before = weights(run)
    for batch in first:
        run.loss(batch).backward()
    try:
        run.step(optimizer)
    except tr.PlanError as error:
        assert_all_same(weights(run), before)
        return str(error)


def test_micro_batches_that_did_not_run_before_the_step_are_noticed():
    for text in on_ranks(2, taken_ahead):
        assert "2 micro-batches were taken from run.steps()" in text and "set shard.hold to nothing" in text


def judged_and_foreign():
    """Evaluation within the counts, and a loop that does not take its batches from the plan."""
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard(hold="all")])
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        for ready in run.steps([rows(4)[rank::2]]):
            for batch in ready:
                run.loss(batch)
    found = gradients(run, rows(4)[rank::2])
    run.model.zero_grad()
    for batch in rows(4)[rank::2]:
        run.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
    return found, all(p.grad is not None for _, p in run.trainable())


def test_evaluation_and_foreign_loops_are_summed_like_without():
    wanted = gradients(tr.compose(build("llama"), [tr.Full()]), rows(4))
    for found, every in on_ranks(2, judged_and_foreign):
        assert_all_same(found, wanted, 1e-6)
        assert every


def unaided(arch, settings):
    """One process, no launcher: the mesh and the process group are made on the way."""
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    run = tr.compose(build(arch, dtype=torch.float64), [tr.Full(), tr.Shard(offload="cpu", **settings)])
    assert torch.distributed.get_world_size() == 1
    devices = {str(local(p).device) for p in run.model.parameters()}
    train(run, STEPS, torch.optim.AdamW, lr=0.01, fused=True)
    return weights(run), devices, run.explain()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # with a head of its own, and tied
def test_offload_without_a_launcher_trains_like_a_plain_process(arch):
    run = tr.compose(build(arch, dtype=torch.float64), [tr.Full()])
    train(run, STEPS, torch.optim.AdamW, lr=0.01)
    [(found, devices, text)] = on_ranks(1, unaided, arch, {"hold": "gradients"})
    assert devices == {"cpu"} and "shards are stored in host memory" in text
    assert "gradients stay complete within a step" in text
    assert_all_same(found, weights(run), 1e-10)
