"""What techniques say they send is what collectives carry, to the byte, on real ranks and in any layout of the mesh."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import treering as tr
from tests.ranks import on_ranks
from tests.toy import rows
from tests.zoo import build, save
from treering.technique import Message, Workload

KINDS = {
    "_allgather_base_": ("all_gather", 1, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "allreduce_": ("all_reduce", 0, 1),
    "alltoall_base_": ("all_to_all", 1, 2),
    "all_gather_into_tensor": ("all_gather", 0, -1),
    "reduce_scatter_tensor": ("reduce_scatter", 0, -1),
    "all_reduce": ("all_reduce", 0, -1),
}
ROWS = {"all_to_all_rows": "all_to_all", "all_to_all_in_pairs": "all_to_all", "all_gather_rows": "all_gather"}


class Recorder(TorchDispatchMode):
    """Bytes that this rank gives to collectives of several ranks, and calls, by kind and number of ranks."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            kind, tensor, group = KINDS[name]
            given = args[tensor] if isinstance(args[tensor], list | tuple) else [args[tensor]]
            if func.namespace == "c10d":
                group = dist.ProcessGroup.unbox(args[group])
            else:
                group = torch.distributed.distributed_c10d._resolve_process_group(args[group])
            size = sum(t.numel() * t.element_size() for t in given)
            if kind == "all_to_all":  # what stays here is not sent
                size -= args[4][group.rank()] * given[0].element_size()
            if group.size() > 1:
                bytes_, calls = self.seen.get((kind, group.size()), (0, 0))
                self.seen[kind, group.size()] = bytes_ + size, calls + 1
        if func.namespace == "treering" and name in ROWS:
            rows, sent, _, group = args if name != "all_gather_rows" else (args[0], args[1], None, args[2])
            group = torch.distributed.distributed_c10d._resolve_process_group(group)
            number = max(sent) if name == "all_gather_rows" else sum(sent) - sent[group.rank()]
            size = number * rows[:1].numel() * rows.element_size()
            bytes_, calls = self.seen.get((ROWS[name], group.size()), (0, 0))
            self.seen[ROWS[name], group.size()] = bytes_ + size, calls + 1
        return func(*args, **(kwargs or {}))


def balanced():
    """A mixture whose tokens all choose the experts 1 and 2: of two ranks, each gets half of the rows."""
    model = build("gpt_oss")
    for name, parameter in model.named_parameters():
        if name.endswith("router.bias"):
            parameter.data[1:3] += 50.0
    return model


def recorded(arch, techniques, sizes, micro_batches, folder):
    """(reported by the techniques, recorded in the second step)."""
    mesh = tr.mesh(**sizes)
    dtype = torch.bfloat16 if arch.endswith("in bfloat16") else torch.float32
    model = balanced() if arch == "balanced" else build(arch.partition(" ")[0], dtype=dtype)
    run = tr.compose(model, [*techniques], mesh=mesh, prepared=folder)
    optimizer = run.optimizer(torch.optim.SGD, lr=0.01)
    for _ in range(2):
        batches = run.ready([{**b, "count": 10} for b in rows(micro_batches, lengths=(12,))])
        with Recorder() as recorder:
            for batch in batches:
                run.loss(batch).backward()
            for applied in run.plan.applied:
                if applied.gradients is not None:
                    applied.gradients()
            for applied in run.plan.applied:
                if applied.before_step is not None:
                    applied.before_step([optimizer])
            optimizer.step()
            for applied in run.plan.applied:
                if applied.after_step is not None:
                    applied.after_step()
            optimizer.zero_grad()
    return reported(run, micro_batches), recorder.seen


def reported(run, micro_batches):
    totals = {}
    for _, message in run.plan.messages(Workload(tokens=12, micro_batches=micro_batches)):
        size, calls = totals.get((message.kind, message.ranks), (0, 0))
        totals[message.kind, message.ranks] = size + message.bytes, calls + message.calls
    return totals


OSFT = {"protect": "weights", "ratio": 0.4}
CASES = {
    "full": ("llama", [tr.Full(), tr.Shard()]),
    "bfloat16": ("llama", [tr.Full(), tr.Shard(compute="bfloat16")]),
    "stored in bfloat16": ("llama in bfloat16", [tr.Full(), tr.Shard()]),
    "stored and reduced in bfloat16": ("llama in bfloat16", [tr.Full(), tr.Shard(reduce="bfloat16")]),
    "computed in float32": ("llama in bfloat16", [tr.LoRA(rank=3), tr.Shard(compute="float32")]),
    "reduced in bfloat16": ("llama", [tr.Full(), tr.Shard(compute="bfloat16", reduce="bfloat16")]),
    "not freed": ("llama", [tr.Full(), tr.Shard(reshard=False)]),
    "gradients stay": ("llama", [tr.Full(), tr.Shard(hold="gradients")]),
    "all stays": ("llama", [tr.Full(), tr.Shard(hold="all")]),
    "offloaded": ("llama", [tr.Full(), tr.Shard(offload="cpu")]),
    "tied": ("gemma2", [tr.Full(), tr.Shard()]),
    "two embeddings": ("gpt2", [tr.Full(), tr.Shard()]),
    "experts": ("qwen3_moe", [tr.Full(), tr.Shard()]),
    "adapters": ("llama", [tr.LoRA(rank=3), tr.Shard()]),
    "adapters in the last block": ("llama", [tr.LoRA(rank=3, targets=("model.layers.1.mlp.*",)), tr.Shard()]),
    "adapters of a tied model": ("gemma2", [tr.LoRA(rank=3), tr.Shard()]),
    "pinned adapters": ("llama", [tr.LoRA(rank=3), tr.Shard(compute="bfloat16")]),
    "pinned adapters, recomputed": ("llama", [tr.LoRA(rank=3), tr.Recompute(), tr.Shard(compute="bfloat16")]),
    "recomputed, tiled": (
        "llama",
        [tr.Full(), tr.TiledBlock(tile=5), tr.TiledLoss(tile=5), tr.Recompute(), tr.Shard()],
    ),
    "update": ("llama", [tr.OSFT(**OSFT), tr.Shard()]),
    "update of experts": ("qwen3_moe", [tr.OSFT(**OSFT), tr.Shard()]),
    "update, cached": ("llama", [tr.OSFT(**OSFT, communication="cached"), tr.Shard()]),
    "factors": ("llama", [tr.OSFT(**OSFT, form="factors"), tr.Shard()]),
    "factors, gathered": ("llama", [tr.OSFT(**OSFT, form="factors", communication="gather"), tr.Shard()]),
    "factors, cached": ("llama", [tr.OSFT(**OSFT, form="factors", communication="cached"), tr.Shard()]),
    "one-sided": ("llama", [tr.OSFT(**OSFT, form="one_sided"), tr.Shard()]),
}
EVERY = tr.LoRA(rank=3, targets="all-linear")
LAST = tr.LoRA(rank=3, targets=("model.layers.1.mlp.experts.*",))
ASSIGNED = {
    "assigned experts": ("balanced", [tr.Full(), tr.Shard()]),
    "assigned experts, recomputed": ("balanced", [EVERY, tr.Recompute(), tr.Shard()]),
    "assigned experts, kept": ("balanced", [EVERY, tr.Recompute(keep=("all_to_all",)), tr.Shard()]),
    "adapters of the last assigned experts": ("balanced", [LAST, tr.Recompute(), tr.Shard(compute="bfloat16")]),
    "the head after assigned experts": ("balanced", [tr.Full(train=("lm_head.*",)), tr.Recompute(), tr.Shard()]),
}
SHARED = {
    f"rows shared by {layout}, {name}": ("llama", [*techniques, tr.Ulysses(layout=layout), tr.Shard()])
    for layout in ("heads", "gathered")
    for name, techniques in {"full": [tr.Full()], "adapters": [tr.LoRA(rank=3), tr.Recompute()]}.items()
}
CASES |= ASSIGNED | SHARED


def every(cases, sizes, folder):
    return {name: recorded(*CASES[name], sizes, 3, folder / name.replace(" ", "_")) for name in cases}


@pytest.mark.parametrize(
    ("world", "sizes", "cases"),
    [
        (2, {}, tuple(name for name in CASES if name not in ASSIGNED | SHARED)),
        (2, {"shard": 1, "sequence": 2}, tuple(SHARED)),
        (2, {"expert": 2}, tuple(ASSIGNED)),
        (4, {"expert": 2}, ("assigned experts",)),
        pytest.param(4, {"expert": 2}, ("assigned experts, kept",), marks=pytest.mark.slow),
        (3, {}, ("tied", "update, cached", "factors, gathered")),
        pytest.param(3, {}, ("full", "pinned adapters", "update", "factors"), marks=pytest.mark.slow),
        (4, {"replicate": 2, "shard": 2}, ("adapters", "update")),
        pytest.param(4, {"replicate": 2, "shard": 2}, ("full", "experts", "factors"), marks=pytest.mark.slow),
    ],
    ids=[
        *("two ranks", "shared rows", "assigned", "assigned and sharded", "more assigned and sharded"),
        *("uneven rows", "more uneven rows", "replicas", "more replicas"),
    ],
)
def test_what_is_reported_is_what_is_sent(world, sizes, cases, tmp_path):
    for totals in on_ranks(world, every, list(cases), sizes, tmp_path):
        for name, (reported, seen) in totals.items():
            assert reported == seen and reported, name


def of_its_own_teacher(sizes, folder):
    found = {}
    for name, more in {"": [], "not freed": [tr.Shard(reshard=False)], "all": [tr.Shard(hold="all")]}.items():
        shared = [tr.Ulysses()] if "sequence" in sizes else []
        techniques = [tr.LoRA(rank=3), tr.Recompute(), *shared, *(more or [tr.Shard()])]
        run = tr.compose(
            build("llama"), techniques, mesh=tr.mesh(**sizes), prepared=folder, objective=tr.Distill(teacher="base")
        )
        optimizer = run.optimizer(torch.optim.SGD, lr=0.01)
        for _ in range(2):
            batches = run.ready([{**b, "count": 10} for b in rows(2, lengths=(12,))])
            with Recorder() as recorder:
                for batch in batches:
                    run.loss(batch).backward()
                for applied in run.plan.applied:
                    if applied.gradients is not None:
                        applied.gradients()
                optimizer.step()
                optimizer.zero_grad()
        found[name] = reported(run, 2), recorder.seen
    return found


@pytest.mark.parametrize("sizes", [{}, {"shard": 1, "sequence": 2}])
def test_a_model_that_is_its_own_teacher_runs_forward_once_more(sizes, tmp_path):
    for totals in on_ranks(2, of_its_own_teacher, sizes, tmp_path):
        for name, (said, seen) in totals.items():
            assert said == seen, name


def forward_only(folder):
    run = tr.compose(folder, [tr.Shard()], mesh=tr.mesh(), frozen=True)
    with Recorder() as recorder, torch.no_grad():
        run.model(input_ids=rows(1)[0]["input_ids"], use_cache=False)
    return reported(run, 1), recorder.seen


def test_a_frozen_run_only_gathers(tmp_path):
    save("llama", tmp_path)  # once: ranks that write it together read each other's halves
    for totals, seen in on_ranks(2, forward_only, tmp_path):
        assert totals == seen and [kind for kind, _ in seen] == ["all_gather"]


def test_one_rank_sends_nothing():
    run = tr.compose(build("llama"), [tr.LoRA(rank=2)])
    assert run.plan.messages(Workload(tokens=12)) == [] and "sent by each rank" not in run.explain()


@pytest.mark.parametrize(
    ("kind", "sent"), [("all_gather", 300), ("reduce_scatter", 75), ("all_reduce", 150), ("all_to_all", 100)]
)
def test_a_ring_sends_its_share_of_the_bytes(kind, sent):
    message = Message(kind=kind, axes=("shard",), ranks=4, bytes=100, calls=1, content="rows")
    assert message.sent == sent


def explained():
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard()], mesh=tr.mesh())
    return run.explain(Workload(tokens=12, micro_batches=3))


def test_the_plan_shows_the_messages_of_its_techniques():
    text = " ".join(on_ranks(2, explained)[0].split())
    assert "sent by each rank in a step of 3 micro-batches of 12 tokens, in a ring" in text
    assert "shard all_gather 277.7 KiB of parameters in 27 calls over shard" in text
    assert "shard reduce_scatter 138.9 KiB of gradients in 15 calls over shard" in text
