"""The arithmetic and the messages of a step, timed by a model of links; and meshes compared by them."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import treering as tr
from tests.plan.memory_toys import CPU, llama, moe, subject
from tests.toy import rows
from tests.zoo import build
from treering.core.links import Links
from treering.core.pairing import schedule
from treering.core.topology import mesh
from treering.memory import pretend
from treering.memory.forecast import forecast
from treering.memory.meshes import (
    MemoryOfMeshes,
    MeshShape,
    TimedMesh,
    by_time,
    mesh_lines,
    probe_shape,
    recommended,
    resized,
    shapes,
)
from treering.memory.operations import operations
from treering.memory.traffic import StepTime, counted, schedule_lines, step_time, stride, timed
from treering.plan import draft
from treering.technique import Message, Workload

LINKS = Links(node=4, inside=100.0, between=10.0, latency=0.0, arithmetic=1e3)


def test_bytes_are_divided_between_the_links_of_a_node_and_those_between_nodes():
    assert LINKS.divided(90.0, 3) == (90.0, 0.0)  # one node
    assert LINKS.divided(70.0, 8) == pytest.approx((30.0, 40.0))  # three neighbours of seven
    assert LINKS.divided(80.0, 8, ring=True) == (60.0, 20.0)  # every fourth ring leaves the node
    assert LINKS.divided(90.0, 8, stride=4, ring=True) == (0.0, 90.0)  # one of them in each node
    assert LINKS.divided(90.0, 8, stride=2) == pytest.approx((90 / 7, 540 / 7))
    assert LINKS.divided(90.0, 1) == (0.0, 0.0) and LINKS.seconds(90.0, 1, calls=3) == 0.0


def test_both_links_are_used_at_once_and_each_call_costs_a_latency():
    assert LINKS.seconds(70.0, 8) == pytest.approx(4.0)
    assert replace(LINKS, latency=2.0).seconds(80.0, 8, calls=3, ring=True) == pytest.approx(2.0 + 6.0)


def test_how_far_apart_the_ranks_of_an_axis_are():
    sizes = {"replicate": 2, "shard": 3, "sequence": 4, "expert": 6, "efsdp": 2}
    axes = [("sequence",), ("shard",), ("shard", "sequence"), ("replicate",), ("expert",), ("efsdp",)]
    assert [stride(one, sizes) for one in axes] == [1, 4, 1, 12, 1, 6]


def composed(techniques, config=None):
    if config is None:
        return tr.compose(build("llama"), techniques).plan
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    return draft(model, techniques, weights=False)


@pytest.mark.parametrize(
    ("techniques", "more"),
    [([tr.Full()], 0.0), ([tr.Full(), tr.Recompute()], 0.0), ([tr.Full(train=("lm_head.*",))], 0.5)],
    ids=["full", "recomputed", "head"],
)
def test_products_are_those_that_torch_counts(techniques, more):
    """What is in front of everything that trains has no backward, which is not counted apart."""
    run = tr.compose(build("llama"), techniques)
    length = 40
    with FlopCounterMode(display=False) as counter:
        for batches in run.steps([rows(1, lengths=(length,))]):
            run.loss(batches[0]).backward()
    by_operator = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in by_operator.items() if "mm" in str(op))
    found = operations(run.plan, length)
    # the head is computed for trained tokens only, the last token has no target; block inputs of the first need no
    # gradient where the embedding does not train
    assert products <= found.products * 1.001 and found.products <= products * (1.08 + 2 * more)


def test_attention_counts_the_pairs_that_see_each_other():
    plan = composed([tr.Full()], llama(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))
    found = operations(plan, 100).attention
    pairs = 4 * 100 * 100 / 2
    assert found == 3 * 2 * pairs * (2 + 5) * 16
    frozen = draft_frozen()
    assert operations(frozen, 100).attention == pytest.approx(6 * 2 * pairs * 2 * 16)
    window = composed([tr.Full()], hf.MistralConfig(**SMALL, sliding_window=10))
    wide = composed([tr.Full()], hf.MistralConfig(**SMALL, sliding_window=None))
    brute = sum(min(i + 0.5, 10) for i in range(100)) / (100 * 100 / 2)
    assert operations(window, 100).attention / operations(wide, 100).attention == pytest.approx(brute, rel=0.01)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def draft_frozen():
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(llama())
    return draft(model, [], frozen=True, weights=False)


def test_a_token_goes_through_the_experts_that_it_chooses():
    few, all_of_them = (
        operations(composed([tr.Full()], moe(num_hidden_layers=2, num_experts_per_tok=n)), 50) for n in (1, 4)
    )
    experts = 2 * 4 * 3 * 64 * 64  # layers × experts × matrices
    assert all_of_them.products - few.products == pytest.approx(6 * 0.75 * experts * 50)


def test_a_model_that_is_its_own_teacher_runs_forward_once_more():
    with torch.device("meta"):
        models = [hf.AutoModelForCausalLM.from_config(llama()) for _ in range(2)]
    techniques = [tr.LoRA(rank=2), tr.TiledLoss()]
    alone = operations(draft(models[0], techniques, weights=False), 50)
    taught = operations(draft(models[1], techniques, weights=False, objective=tr.Distill(teacher="base")), 50)
    with torch.device("meta"):
        frozen = operations(draft(hf.AutoModelForCausalLM.from_config(llama()), [], frozen=True, weights=False), 50)
    assert taught.products - alone.products == pytest.approx(frozen.products)
    assert taught.attention - alone.attention == pytest.approx(frozen.attention)


def on_mesh(config, techniques, shape):
    with pretend.ranks(shape.replicate * shape.sharing):
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(config)
        sizes = {axis: shape.sizes[axis] for axis in ("replicate", "shard", "sequence", "expert")}
        return draft(model, techniques, mesh=mesh(device="cpu", **sizes), weights=False)


WIDE = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
CASES = {
    "full": (llama(**WIDE, num_key_value_heads=4), [tr.Full(), tr.Recompute()], 1),
    "adapters": (llama(**WIDE, num_key_value_heads=4), [tr.LoRA(rank=16)], 1),
    "update": (llama(**WIDE, num_key_value_heads=4), [tr.OSFT(protect="weights", ratio=0.5)], 1),
    "merged": (llama(**WIDE, num_key_value_heads=4), [tr.OSFT()], 1),
    "experts": (moe(**WIDE, num_key_value_heads=4, num_experts=32), [tr.Full()], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_messages_of_every_mesh_are_read_from_one(name):
    config, techniques, expert = CASES[name]
    techniques = [*techniques, tr.Ulysses(), tr.Shard()]
    probe = probe_shape(expert, shared=True)
    plan = on_mesh(config, techniques, probe)
    others = [(1, 4, 1), (1, 2, 4), (4, 2, 2), (4, 1, 2), (2, 4, 4), (1, 1, 8)]
    for replicate, shard, sequence in others:
        shape = MeshShape(replicate=replicate, shard=shard, sequence=sequence, expert=expert)
        work = Workload(tokens=256, micro_batches=2, sequence=sequence)
        found = totals(resized(plan.messages(work), probe, shape))
        wanted = totals(on_mesh(config, techniques, shape).messages(replace(work, sequence=None)))
        assert found.keys() == wanted.keys(), shape
        for key, (size, calls) in wanted.items():
            assert found[key] == (pytest.approx(size, rel=0.02), calls), (shape, key)


def totals(messages):
    sums = {}
    for name, one in messages:
        key = (name, one.kind, one.ranks, one.content, one.stride)
        size, calls = sums.get(key, (0, 0))
        sums[key] = size + one.bytes, calls + one.calls
    return sums


def test_every_mesh_of_so_many_ranks_is_there_once():
    found = list(shapes(12, 1, shared=True))
    assert len(found) == len(set(found)) == 18 and all(one.replicate * one.sharing == 12 for one in found)
    assert {one.sequence for one in shapes(12, 1, shared=False)} == {1}
    assert all(one.sharing % 4 == 0 for one in shapes(12, 4, shared=True))


def test_a_step_waits_for_what_nothing_is_computed_during():
    shape = MeshShape(replicate=1, shard=4, sequence=2)
    plan = on_mesh(CASES["full"][0], [tr.Full(), tr.Ulysses(), tr.Shard()], shape)
    work, sizes = Workload(tokens=512, micro_batches=3), shape.sizes
    messages = timed(plan.messages(work), sizes, LINKS)
    arithmetic = counted(plan, 512)
    found = step_time(plan, work, messages, sizes, LINKS, arithmetic)
    assert found.computing == pytest.approx(3 * (arithmetic.products + arithmetic.attention) / 2 / LINKS.arithmetic)
    exchanges = [one for one in messages if one.technique == "ulysses"]
    assert found.waiting == pytest.approx(sum(one.seconds for one in exchanges)) and found.overlapping > 0
    assert found.seconds == pytest.approx(max(found.computing, found.overlapping) + found.waiting)
    assert found.tokens == 512 * 3 * 4
    assert all(one.inside + one.between == pytest.approx(one.message.sent) for one in messages)


def test_a_mesh_with_more_tokens_than_a_step_has_is_left_out():
    config, techniques, _ = CASES["full"]
    probe = probe_shape(1, shared=True)
    plan = on_mesh(config, [*techniques, tr.Ulysses(), tr.Shard()], probe)
    found = by_time(plan, probe, 8, 1024, LINKS, tokens_per_step=2048, shared=True)
    assert {one.shape.replicate * one.shape.shard for one in found} == {1, 2}
    assert {one.step.tokens for one in found} == {2048}
    assert [one.each for one in found] == pytest.approx(sorted(one.each for one in found), rel=0.01)


def test_one_trace_shows_what_every_other_mesh_needs_at_least():
    def traced(shape):
        sizes = {"replicate": shape.replicate, "shard": shape.shard, "sequence": shape.sequence}
        techniques = [tr.Full(), tr.Recompute(), tr.Ulysses(), tr.Shard()]
        settings = subject(llama(**WIDE, num_key_value_heads=4), techniques, world=8, sizes=sizes, on="cpu")
        return forecast(settings, 300, device=CPU).at(300)

    first, *others = (MeshShape(replicate=r, shard=s, sequence=q) for r, s, q in ((4, 1, 2), (1, 4, 2), (2, 1, 4)))
    for known, other in ((first, others[0]), (first, others[1]), (others[0], first)):
        memory = MemoryOfMeshes(traced, most=1)
        memory.know(known, traced(known))
        assert memory.bytes(known) == memory.at_least(known) == traced(known).device
        least = memory.at_least(other)
        assert 0.6 < least / memory.bytes(other) <= 1.0
        assert memory.bytes(MeshShape(replicate=1, shard=1, sequence=8)) is None  # no more traces
        assert memory.bytes(replace(other, replicate=16)) == memory.bytes(other)  # replicas share nothing


def made(sequence, shard, seconds):
    step = StepTime(products=seconds, attention=0.0, waiting=0.0, overlapping=0.0, tokens=1000)
    return TimedMesh(shape=MeshShape(replicate=1, shard=shard, sequence=sequence), step=step)


class Known:
    """Rows of n ranks need 64 / n bytes."""

    def bytes(self, shape):
        return 64.0 / shape.sequence

    at_least = bytes


def test_the_fastest_that_fit_are_recommended_and_faster_ones_named():
    meshes = [made(1, 8, 1.0), made(2, 4, 1.1), made(4, 2, 1.2), made(4, 1, 1.3), made(8, 1, 1.4)]
    fitting, refused = recommended(meshes, Known(), 20.0, most=2)
    assert [one.shape.sequence for one, _ in fitting] == [4, 8] and [needed for _, needed in refused] == [64.0, 32.0]
    text = "\n".join(mesh_lines(fitting, refused, 20.0))
    assert "least time of those that fit: mesh: {replicate: 1, shard: 2, sequence: 4}" in text
    assert "would be faster and do not fit: {replicate: 1, shard: 8, sequence: 1}" in text and "so do 1 more" in text
    assert [one.shape.sequence for one, _ in recommended(meshes, None, None)[0]] == [1, 2, 4]
    assert mesh_lines(*recommended(meshes, Known(), 2.0), 2.0)[-1] == "no mesh of these ranks fits"


def test_a_schedule_names_the_pairs_of_each_round():
    lines = schedule_lines(5)
    assert lines[0].endswith("5 ranks of the axis sequence: 5") and "0 rests" in lines[1]
    for line, pairs in zip(lines[1:], schedule(5)):
        assert line.partition(": ")[2].split(", ")[:2] == [f"{a}–{b}" for a, b in pairs]
    many = schedule_lines(1024)
    assert many[0].endswith(": 1023") and len(many) == 10 and "and 480 more" in many[1] and "1015 more" in many[-1]
    assert schedule_lines(1) == ["rounds of pairs (transport: paired) among 1 ranks of the axis sequence: 0"]


def test_a_message_without_other_ranks_takes_no_time():
    one = Message(kind="all_gather", axes=("shard",), ranks=1, bytes=10, calls=1, content="rows")
    sizes = {"replicate": 1, "shard": 1, "sequence": 1, "expert": 1, "efsdp": 1}
    assert timed([("shard", one)], sizes, Links())[0].seconds == 0.0
