"""What ulysses reports that it sends is what its operators send: bytes and calls of each rank, on real ranks."""

from functools import cache

import pytest
import torch
import transformers as hf

import treering as tr
from tests.ranks import on_ranks
from tests.toy import packed, rows
from tests.zoo import build
from treering.core.row_messages import recorded
from treering.technique import Workload

LAYERS = 2
LENGTHS = (7, 13, 1, 4)  # no number of ranks here divides 25
LAST = "model.layers.1.*"
EVERY = tr.Recompute()
KEPT = tr.Recompute(keep=("all_to_all",))
LEARNING = {
    "all": [tr.Full()],
    "bfloat16": [tr.Full(), tr.Shard(compute="bfloat16")],
    "recomputed": [tr.Full(), EVERY],
    "kept": [tr.Full(), KEPT],
    "tiled, recomputed": [tr.Full(), tr.TiledBlock(tile=5), tr.TiledLoss(tile=5), EVERY],
    "adapters": [tr.LoRA(rank=2), EVERY],
    "the last block": [tr.Full(train=(LAST,)), EVERY],
    "the head": [tr.Full(train=("lm_head.*",)), EVERY],
    "the last block's MLP": [tr.Full(train=("model.layers.1.mlp.*",)), EVERY],
    "the last block's second norm": [tr.Full(train=("*layers.1.post_attention_layernorm.*",)), EVERY],
    "the last block's queries": [tr.LoRA(rank=2, targets=("*layers.1.*q_proj",)), EVERY],
    "the last block's keys": [tr.LoRA(rank=2, targets=("*layers.1.*k_proj",)), KEPT],
    "the last block's outputs": [tr.LoRA(rank=2, targets=("*layers.1.*o_proj",)), EVERY],
    "the first block's values": [tr.LoRA(rank=2, targets=("*layers.0.*v_proj",))],
}
CODED = {
    "coded": {"codec": "int8"},
    "coded in part": {"codec": "e4m3", "uncoded": ("key", "gradients")},
    "coded, in bfloat16": {"codec": "int8", "uncoded": ("value",)},
}
LEARNING |= {"coded": [tr.Full(), EVERY], "coded in part": [tr.Full(), KEPT]}
LEARNING["coded, in bfloat16"] = [tr.Full(), tr.Shard(compute="bfloat16")]


@cache
def mesh(ranks, shards=1):
    return tr.mesh(shard=shards, sequence=ranks)


def step():
    return [packed(LENGTHS), packed((9, 3), seed=1)], (25, 12)


def reported(plan, tokens, micro_batches=1):
    """(calls, bytes to other ranks) of exchanges and of gathers, of one micro-batch or several equal ones."""
    found = {"all_to_all": (0, 0), "all_gather": (0, 0)}
    for name, message in plan.messages(Workload(tokens=tokens, micro_batches=micro_batches)):
        if name in ("ulysses", "teacher") and message.axes == ("sequence",):
            calls, size = found[message.kind]
            found[message.kind] = calls + message.calls, size + round(message.sent)
    return found


def sent(record, transport):
    exchange = "all_to_all_rows" if transport == "collective" else "all_to_all_in_pairs"
    assert set(record.calls) <= {exchange, "all_gather_rows"}
    return {
        kind: (record.calls.get(name, 0), record.bytes.get(name, 0))
        for kind, name in (("all_to_all", exchange), ("all_gather", "all_gather_rows"))
    }


def composed(arch, learning, layout, transport, ranks, shards=1, **settings):
    techniques = LEARNING[learning] if isinstance(learning, str) else learning
    shard = [] if any(isinstance(one, tr.Shard) for one in techniques) else [tr.Shard()]
    ulysses = tr.Ulysses(
        layout=layout, transport=transport, **CODED.get(learning if isinstance(learning, str) else "", {})
    )
    return tr.compose(build(arch), [*techniques, ulysses, *shard], mesh=mesh(ranks, shards), **settings)


def counted(arch, learning, layout, transport, ranks, shards=1):
    """(reported, sent) of each micro-batch of a step."""
    run, (batches, tokens) = composed(arch, learning, layout, transport, ranks, shards), step()
    found = []
    for ready in run.steps([batches]):
        for number, batch in zip(tokens, ready):
            with recorded() as record:
                run.loss(batch).backward()
            found.append((reported(run.plan, number), sent(record, transport)))
    return found


def all_counted(cases, ranks, shards=1):
    return {case: counted(*case, ranks, shards) for case in cases}


def check(cases, ranks, shards=1):
    for of_rank in on_ranks(ranks * shards, all_counted, cases, ranks, shards):
        for case, found in of_rank.items():
            for said, really in found:
                assert said == really, case


TWO = [
    *(("llama", learning, layout, "collective") for learning in LEARNING for layout in ("heads", "gathered")),
    *(("llama", "kept", layout, "paired") for layout in ("heads", "gathered")),
    *((arch, "all", layout, "paired") for arch in ("deepseek_v3", "gpt2") for layout in ("heads", "gathered")),
    *(("llama", "coded in part", layout, "paired") for layout in ("heads", "gathered")),
    *(("gpt_oss", learning, "heads", "collective") for learning in ("recomputed", "adapters")),
]
MORE = [
    (arch, learning, layout, transport)
    for arch in ("llama", "qwen3_moe")
    for layout in ("heads", "gathered")
    for learning, transport in (("recomputed", "collective"), ("kept", "paired"))
]


@pytest.mark.parametrize(
    ("cases", "ranks"),
    [
        (TWO, 2),
        ([("llama", "all", "heads", "collective"), ("llama", "kept", "gathered", "collective")], 3),
        pytest.param(MORE, 3, marks=pytest.mark.slow),
        (
            [
                ("llama", "kept", "2d", "collective"),
                ("llama", "the last block's queries", "2d", "paired"),
                ("llama", "adapters", "auto", "collective"),
                ("llama", "coded", "2d", "collective"),
            ],
            4,
        ),
        pytest.param(
            [("llama", "recomputed", layout, "paired") for layout in ("heads", "2d")], 6, marks=pytest.mark.slow
        ),
    ],
    ids=["2 ranks", "3 ranks", "3 ranks, more", "4 ranks", "more ranks than heads"],
)
def test_bytes_and_calls_are_those_that_are_reported(cases, ranks):
    check(cases, ranks)


SINKS = [tr.Full(train=("model.layers.0.self_attn.sinks",))]


def of_sinks():
    return {layout: counted("gpt_oss", SINKS, layout, "collective", 2) for layout in ("heads", "gathered")}


def test_sinks_that_train_alone_send_only_the_outputs_gradient():
    for of_rank in on_ranks(2, of_sinks):
        for found in of_rank.values():
            assert all(said == really for said, really in found)
        assert [said["all_to_all"][0] for said, _ in of_rank["heads"]] == [2 + 1 + 2 + 2] * 2


PASSES = {"": [tr.Full()], "recompute": [tr.Full(), EVERY], "keep": [tr.Full(), KEPT]}


def calls(transport):
    """Messages of one layer in a step of one micro-batch, by layout and by what is computed again."""
    return {(layout, name): calls_of(layout, transport, name) for layout in ("heads", "gathered") for name in PASSES}


def calls_of(layout, transport, name):
    run = composed("llama", PASSES[name], layout, transport, 2)
    (batch,) = run.ready([packed(LENGTHS) | {"count": 9}])
    with recorded() as record:
        run.loss(batch).backward()
    return sum(record.calls.values()) / LAYERS


@pytest.mark.parametrize("transport", ["collective", "paired"])
def test_a_layer_sends_four_messages_and_no_more_when_they_are_kept(transport):
    wanted = {
        ("heads", ""): 4, ("heads", "recompute"): 6, ("heads", "keep"): 4,
        ("gathered", ""): 2, ("gathered", "recompute"): 3, ("gathered", "keep"): 2,
    }  # fmt: skip
    assert on_ranks(2, calls, transport) == [wanted] * 2


def of_a_frozen_run(layout):
    run = tr.compose(build("llama"), [tr.Ulysses(layout=layout), tr.Shard()], mesh=mesh(2), frozen=True)
    found = []
    batches, tokens = step()
    for number, batch in zip(tokens, run.ready(batches)):
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
        with recorded() as record, torch.no_grad():
            run.model(**inputs, use_cache=False)
        found.append((reported(run.plan, number), sent(record, "collective")))
    return found


def test_a_frozen_run_sends_what_its_forward_needs():
    for layout in ("heads", "gathered"):
        for found in on_ranks(2, of_a_frozen_run, layout):
            assert all(said == really and any(calls for calls, _ in said.values()) for said, really in found)


def wide(key_heads):
    """A model whose arrangement bytes decide, and not the number of messages."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 128}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=key_heads))


def of_a_teacher(folder):
    techniques = [tr.LoRA(rank=2), tr.TiledLoss(tile=5), tr.Ulysses(), tr.Shard()]
    objective = tr.Distill(teacher=str(folder / "teacher"))
    run = tr.compose(wide(1), techniques, mesh=mesh(4), objective=objective, prepared=folder / "prepared")
    batches, tokens = step()
    found = []
    for number, batch in zip(tokens, run.ready([one | {"count": 10} for one in batches])):
        with recorded() as record:
            run.loss(batch).backward()
        found.append((reported(run.plan, number), sent(record, "collective")))
    grids = [one.techniques[-2].grid(one.anatomy, 4) for one in (run.plan, run.plan.teacher)]
    return grids, tr.Ulysses().grid(run.plan.teacher.anatomy, 4), found


def test_a_teacher_sends_by_the_arrangement_of_its_student(tmp_path):
    wide(8).save_pretrained(tmp_path / "teacher")
    for (student, teacher), alone, found in on_ranks(4, of_a_teacher, tmp_path):
        assert student == teacher != alone
        assert all(said == really for said, really in found)


def test_equal_micro_batches_send_as_often():
    for said, really in on_ranks(2, of_two_micro_batches):
        assert said == really


def of_two_micro_batches():
    run = composed("llama", "kept", "heads", "collective", 2)
    with recorded() as record:
        for batch in run.ready([one | {"count": 9} for one in rows(2, lengths=(11,))]):
            run.loss(batch).backward()
    return reported(run.plan, 11, 2), sent(record, "collective")
