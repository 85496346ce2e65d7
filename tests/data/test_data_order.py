"""Order, assignment to ranks and batches: pure functions of (seed, epoch, step), for any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.core.errors import ConfigError
from treering.data.config import Data
from treering.data.examples import build
from treering.data.loader import Loader, assign_bins, collate, cost
from treering.data.order import Order, scrambled


def lognormal(count, longest=4096):
    drawn = np.random.default_rng(0).lognormal(np.log(450), 0.8, count)
    return np.clip(drawn, 8, longest).astype(np.int32)


def epoch_of(order, epoch):
    return [order.bins(epoch, step) for step in range(order.steps_in_epoch(epoch))]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 64), min_size=1, max_size=80),
    seed=st.integers(0, 2**63 - 1),
    step_bins=st.integers(1, 5),
    packing=st.sampled_from(["on", "off"]),
    shuffle=st.booleans(),
)
def test_every_document_comes_once_an_epoch_and_bins_are_at_most_full(lengths, seed, step_bins, packing, shuffle):
    lengths = np.array(lengths, dtype=np.int32)
    order = Order(lengths, seed=seed, tokens_per_step=64 * step_bins, capacity=64, packing=packing, shuffle=shuffle)
    for epoch in range(2):
        steps = epoch_of(order, epoch)
        assert sorted(d for bins in steps for documents in bins for d in documents) == list(range(len(lengths)))
        assert all(len(bins) == step_bins for bins in steps[:-1]) and 1 <= len(steps[-1]) <= step_bins
        for documents in (documents for bins in steps for documents in bins):
            sizes = lengths[documents]
            area = sizes.sum() if packing == "on" else sizes.max() * len(sizes)
            assert 0 < area <= 64


@pytest.mark.parametrize("capacity", [4096, 8192, 32768])
def test_bins_are_98_percent_full(capacity):
    order = Order(lognormal(30_000), seed=1, tokens_per_step=capacity * 4, capacity=capacity)
    assert order.fill(0) >= 0.98


def test_an_epoch_of_pools_does_not_leave_documents_behind():
    lengths = np.full(30_000, 2100, dtype=np.int32)  # no two fit into one bin: all wait again and again
    order = Order(lengths, seed=1, tokens_per_step=4096, capacity=4096)
    assert order.steps_in_epoch(0) == 30_000


def test_order_depends_on_seed_and_epoch_alone():
    lengths = lognormal(2000)
    make = lambda seed: Order(lengths, seed=seed, tokens_per_step=16384, capacity=4096)  # noqa: E731
    first, second = make(7), make(7)
    later = second.bins(3, 1)  # asked in another order, on a fresh object
    assert epoch_of(first, 0) == epoch_of(second, 0)
    assert first.bins(3, 1) == later
    assert epoch_of(first, 0) != epoch_of(first, 1)
    assert epoch_of(first, 0) != epoch_of(make(8), 0)


def test_the_permutation_is_the_same_in_every_version():
    """Against splitmix64 in plain integers, and its published first output for the seed 0."""
    wrap = (1 << 64) - 1

    def splitmix(state):
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & wrap
        return z ^ (z >> 31)

    for seed in (0, 42, 2**63 - 1):
        expected = [splitmix((seed + (i + 1) * 0x9E3779B97F4A7C15) & wrap) for i in range(50)]
        assert scrambled(50, seed).tolist() == expected
    assert int(scrambled(1, 0)[0]) == 0xE220A8397B1DCDAF


def test_without_shuffling_documents_come_in_order():
    lengths = np.full(100, 64, dtype=np.int32)
    order = Order(lengths, seed=1, tokens_per_step=64, capacity=64, shuffle=False)
    assert [bins[0][0] for bins in epoch_of(order, 0)] == list(range(100))


def test_steps_are_located_in_their_epochs():
    order = Order(lognormal(300), seed=1, tokens_per_step=16384, capacity=4096)
    steps = order.steps_in_epoch(0)
    assert order.locate(0) == (0, 0) and order.locate(steps - 1) == (0, steps - 1) and order.locate(steps) == (1, 0)


def test_a_document_that_fits_nowhere_is_a_config_error():
    with pytest.raises(ConfigError, match="capacity is 100 but the longest document has 200 tokens") as caught:
        Order(np.array([200]), seed=0, tokens_per_step=1000, capacity=100)
    assert caught.value.field == "capacity"
    with pytest.raises(ConfigError) as caught:
        Order(np.array([200]), seed=0, tokens_per_step=100, capacity=1000)
    assert caught.value.field == "tokens_per_step"


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 900), max_size=30), ranks=st.integers(1, 9))
def test_every_rank_gets_as_many_bins_and_none_is_lost(lengths, ranks):
    sizes = np.array(lengths, dtype=np.int32)
    bins = [[i] for i in range(len(lengths))]
    assigned = assign_bins(bins, sizes, ranks)
    assert len(assigned) == ranks and len({len(share) for share in assigned}) == 1
    assert sorted(b[0] for share in assigned for b in share if b) == list(range(len(lengths)))
    for share in assigned:
        costs = [cost(documents, sizes) for documents in share]
        assert costs == sorted(costs, reverse=True)


def assigned_before(bins, lengths, ranks):
    """The loop of the first version. Which rank computes which bin, and in which order, is part of a run's identity."""
    bins_per_rank = -(-len(bins) // ranks)
    costs = [cost(documents, lengths) for documents in bins]
    assigned, load = [[] for _ in range(ranks)], [0.0] * ranks
    for i in sorted(range(len(bins)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(assigned[r]) < bins_per_rank), key=lambda r: (load[r], r))
        assigned[rank].append(bins[i])
        load[rank] += costs[i]
    return [share + [[] for _ in range(bins_per_rank - len(share))] for share in assigned]


@settings(max_examples=200, deadline=None)
@given(
    bins=st.lists(st.lists(st.sampled_from([2, 2, 3, 100, 8192]) | st.integers(2, 9000), max_size=6), max_size=40),
    ranks=st.integers(1, 17),
)
def test_bins_are_assigned_as_by_the_first_version(bins, ranks):
    lengths = np.array([length for documents in bins for length in documents], dtype=np.int32)
    ends = np.cumsum([len(documents) for documents in bins], dtype=int)
    indices = [list(range(end - len(documents), end)) for documents, end in zip(bins, ends)]
    assert assign_bins(indices, lengths, ranks) == assigned_before(indices, lengths, ranks)


def test_assignment_balances_attention():
    """One document of a bin's size costs more than many short ones of the same number of tokens."""
    lengths = np.array([8192, 8192, *[128] * 128], dtype=np.int32)
    bins = [[0], [1], list(range(2, 66)), list(range(66, 130))]
    loads = [sum(cost(documents, lengths) for documents in share) for share in assign_bins(bins, lengths, 2)]
    assert loads[0] == pytest.approx(loads[1])


@pytest.fixture(scope="module")
def examples(tokenizers, tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("loader") / "train.jsonl"
    turns = lambda i: [  # noqa: E731
        {"role": "user", "content": "why " * (i % 9 + 1)},
        {"role": "assistant", "content": "so " * (i * 7 % 23 + 1)},
    ]
    path.write_text("".join(json.dumps({"messages": turns(i)}) + "\n" for i in range(60)))
    return build(Data(train=str(path), cache=None), tokenizers["chatml"])


def loader(examples, rank=0, ranks=1, packing="on"):
    order = Order(examples.lengths, seed=3, tokens_per_step=700, capacity=128, packing=packing)
    return Loader(examples, order, rank=rank, ranks=ranks, packing=packing)


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_a_step_holds_the_same_documents_and_count_on_any_number_of_ranks(examples, ranks, packing):
    alone = loader(examples, packing=packing).step(1, 0)
    shares = [loader(examples, rank, ranks, packing).step(1, 0) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert sorted(s for b in batches for s in b["samples"]) == sorted(s for b in alone for s in b["samples"])
    trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert {batch["count"] for batch in batches} == {trained}


def test_a_packed_batch_holds_documents_end_to_end(examples):
    batch = collate([examples.document(i) for i in (4, 9)], 17, "cpu")
    lengths = examples.lengths[[4, 9]].tolist()
    assert batch["input_ids"].shape == (1, sum(lengths)) and batch["input_ids"].dtype == torch.int64
    assert batch["position_ids"].tolist() == [[*range(lengths[0]), *range(lengths[1])]]
    assert list(batch["documents"].lengths) == lengths
    assert batch["labels"][0, 0] == -100 and batch["labels"][0, lengths[0]] == -100
    trained = batch["labels"] != -100
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    assert int(trained.sum()) == examples.trained[[4, 9]].sum()
    assert batch["samples"] == ["train.jsonl:5", "train.jsonl:10"]


def test_padded_rows_start_alike_and_train_no_padding(examples):
    batch = collate([examples.document(i) for i in (4, 9)], 17, "cpu", "off")
    width = int(examples.lengths[[4, 9]].max())
    assert batch["input_ids"].shape == (2, width) and "documents" not in batch
    assert batch["position_ids"].tolist() == [list(range(width))] * 2
    assert int((batch["labels"] != -100).sum()) == examples.trained[[4, 9]].sum()


@pytest.mark.parametrize("packing", ["on", "off"])
def test_an_empty_bin_is_a_batch_without_a_label(packing):
    batch = collate([], 17, "cpu", packing)
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == -100).all()
    assert batch["samples"] == [] and batch["count"] == 17


def test_resuming_at_any_step_gives_the_same_batches(examples):
    complete = loader(examples).iter_from(0)
    steps = [next(complete) for _ in range(12)]
    assert loader(examples).position(11)["epoch"] > 0
    for start in (1, 5, 11):
        again = next(loader(examples).iter_from(start))
        assert [b["samples"] for b in again] == [b["samples"] for b in steps[start]]
        for a, b in zip(again, steps[start], strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])


def test_an_evaluation_sees_every_document_once(examples):
    seen = [sample for step in loader(examples).once() for batch in step for sample in batch["samples"]]
    assert sorted(seen) == sorted(examples.sample_id(i) for i in range(len(examples)))
