"""Counted on a process group that records: what every form sends is what its formula says, on uneven shards too."""

from functools import cache
from math import ceil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import treering as tr
from benchmarks.traffic import of_a_step
from treering.anatomy import examine
from treering.anatomy.matrices import Matrix
from treering.techniques.osft.protection.operators import operator_shapes
from treering.techniques.osft.protection.targets import targets

RANKS = 5
BYTES = 4
HIDDEN, VOCABULARY, LAYERS = 24, 32, 1
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=52,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    dtype="float32",
)


def gathered(rows: int, columns: int = 1, size: int = BYTES) -> int:
    """What one rank sends on in a ring, of a tensor that is dealt by rows, each rank's padded to the same number."""
    return (RANKS - 1) * ceil(rows / RANKS) * columns * size


def summed(numbers: int) -> float:
    return 2 * (RANKS - 1) / RANKS * numbers * BYTES


@cache
def linears() -> tuple[Matrix, ...]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG)
    return targets(tr.OSFT(form="update"), examine(model))


def counted(technique, ranks: int = RANKS, rank: int = 0, **more: bool) -> dict[str, float]:
    traffic = of_a_step(CONFIG, [technique, tr.Shard()], ranks, rank=rank, **more)
    return {phase: traffic.sent(phase) for phase in ("model", "gradients", "step")}


def by_weights(target: Matrix, ratio: float) -> tuple[int, int, dict[str, int]]:
    """Free and held singular directions, and the columns of the smaller basis that says so at each end."""
    free = int(ratio * target.rank)
    held = target.rank - free
    ends = {"out": target.outputs, "in": target.inputs}
    return free, held, {end: free if size == target.rank and free < held else held for end, size in ends.items()}


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_coefficients_are_summed_in_the_smaller_basis(ratio):
    found = counted(tr.OSFT(form="factors", protect="weights", ratio=ratio))
    wanted = 0.0
    for target in linears():
        free, _, columns = by_weights(target, ratio)
        wanted += sum(summed(k * free) for k in columns.values())
    assert found["gradients"] == found["step"] == pytest.approx(wanted, rel=1e-12)


def test_gathered_bases_travel_whole_once_a_pass():
    found = counted(tr.OSFT(form="factors", protect="weights", communication="gather"))
    wanted = 0
    for target in linears():
        _, _, columns = by_weights(target, 0.25)
        wanted += gathered(columns["out"], target.outputs) + gathered(columns["in"], target.inputs)
    assert found["gradients"] == found["step"] == wanted


@pytest.mark.parametrize(
    "technique",
    [
        tr.OSFT(form="factors", protect="weights", communication="cached"),
        tr.OSFT(form="forward", protect="weights"),
        tr.OSFT(form="one_sided"),
        tr.OSFT(form="one_sided", protect="weights"),
        tr.OSFT(form="core", protect="weights"),
    ],
    ids=lambda technique: f"{technique.form}-{technique.protect}",
)
def test_forms_that_project_where_they_compute_send_nothing_more(technique):
    found = counted(technique)
    assert found["model"] > 0
    assert found["gradients"] == found["step"] == 0


@pytest.mark.parametrize(
    "technique",
    [
        tr.OSFT(form="update"),
        tr.OSFT(precision="float32", form="update"),
        tr.OSFT(strength="hard", ratio=0.25, form="update"),
        tr.OSFT(protect="weights"),
        tr.OSFT(protect="both"),
    ],
    ids=lambda technique: f"{technique.protect}-{technique.strength}-{technique.precision}",
)
def test_update_gathers_at_the_inputs_and_sums_at_the_outputs(technique):
    found = counted(technique)
    wanted = 0.0
    for target in linears():
        sides = {side.end: side for side in operator_shapes(technique, target)}
        width = target.inputs
        if at_inputs := sides.get("in"):
            soft = technique.strength == "soft" and technique.protect != "weights"
            size = 2 if soft and technique.precision == "bfloat16" else BYTES
            wanted += gathered(target.inputs, target.inputs if at_inputs.stored_as_matrix else at_inputs.columns, size)
            width = at_inputs.columns if at_inputs.thin and not at_inputs.stored_as_matrix else width
        if at_outputs := sides.get("out"):
            wanted += summed(at_outputs.columns * width)
    assert wanted > 0
    assert found["gradients"] == found["step"] == pytest.approx(wanted, rel=1e-12)


def test_operators_of_weights_that_read_the_same_inputs_are_gathered_once():
    gather = tr.OSFT(precision="float32", form="update")
    alone, shared = counted(gather), counted(gather, statistics=True)
    assert alone["step"] - shared["step"] == 3 * gathered(HIDDEN, HIDDEN)  # k, v and up
    assert alone["gradients"] == alone["step"] and shared["gradients"] == shared["step"]


def test_merging_gathers_each_basis_once_after_the_step():
    for technique, size in ((tr.OSFT(ratio=0.5), 2), (tr.OSFT(strength="hard", ratio=0.5), BYTES)):
        found = counted(technique)
        assert found["gradients"] == 0
        assert found["step"] == sum(gathered(t.inputs, t.inputs // 2, size) for t in linears())


def test_cached_operators_stay_and_rows_go_there_and_back():
    ranks = 4  # divides all rows here, so that what all ranks send is the same whoever owns what
    # Shapes only: the pretended group has nothing to hand to a rank that sends nothing.
    every = [
        counted(tr.OSFT(protect="both", communication="cached"), ranks, rank, shapes_only=True) for rank in range(ranks)
    ]
    each = sum(2 * (ranks - 1) / ranks * t.outputs * t.inputs * BYTES / ranks for t in linears())
    assert sum(found["gradients"] for found in every) == sum(found["step"] for found in every) == ranks * each


def test_fsdp_gathers_twice_and_reduces_once():
    dense = sum(gathered(t.outputs, t.inputs) for t in linears())
    norms = 2 * LAYERS * gathered(HIDDEN)
    table = gathered(VOCABULARY, HIDDEN)  # an embedding, or the head
    last = gathered(HIDDEN)  # the root's, and never freed between forward and backward
    full = counted(tr.Full())["model"]
    assert full == 3 * (dense + norms + 2 * table) + 2 * last
    update = counted(tr.OSFT(form="update"))[
        "model"
    ]  # a frozen embedding is fetched ahead in the backward too, for nothing
    assert update == 3 * dense + 2 * (norms + 2 * table) + last


def test_factors_are_gathered_in_place_of_the_weight():
    held = learning = 0
    for target in linears():
        free, kept, _ = by_weights(target, 0.25)
        held += gathered(target.outputs, kept) + gathered(target.inputs, kept) + gathered(kept)
        learning += gathered(target.outputs, free) + gathered(target.inputs, free) + gathered(free)
    norms, table = 2 * LAYERS * gathered(HIDDEN), gathered(VOCABULARY, HIDDEN)
    found = counted(tr.OSFT(form="forward", protect="weights"))["model"]
    assert found == 2 * held + 3 * learning + 2 * (norms + 2 * table) + gathered(HIDDEN)
