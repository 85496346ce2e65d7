"""The largest coordinates as gaps and values: what is kept, what it costs, and fillers of wide gaps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.same import assert_same
from tests.sketches.toy import normal
from treering.sketches import reference, topk

WIDE = 300_000


def coded(rows, entries, restore_norm=False):
    gaps, values, scales = topk.encode(rows, entries, restore_norm)
    assert gaps.dtype == torch.uint16 and values.dtype == torch.int8 and gaps.shape == (len(rows), entries)
    return topk.decode(gaps, values, scales, rows.shape[1])


def sparse(numbers, *places):
    row = torch.zeros(1, numbers)
    for place, value in places:
        row[0, place] = value
    return row


def test_the_largest_coordinates_are_kept():
    rows = normal(6, 500)
    for row, found in zip(rows, coded(rows, 40)):
        wanted = reference.largest(row, 40)
        assert set(found.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
        assert_same(found, reference.coded(wanted, 127), 1e-6)


def test_all_coordinates_are_the_row():
    rows = normal(4, 60)
    for row, found in zip(rows, coded(rows, 60, restore_norm=True)):
        assert_same(found, row, 0.01)


@pytest.mark.parametrize("count", [1, 7, 42])
@pytest.mark.parametrize("numbers", [64 * 4 * 42, 64 * 200 + 17, 50])
def test_searching_chunks_finds_the_same(count, numbers):
    rows = normal(3, numbers)
    count = min(count, numbers)
    values, places = topk.largest(rows, count)
    assert torch.equal(rows.gather(1, places), values)
    assert torch.equal(values.abs(), rows.abs().topk(count, 1).values)


def test_the_norm_of_the_complete_row_is_kept():
    rows = normal(6, 900) * torch.logspace(-25, 25, 6)[:, None]
    for row, found in zip(rows, coded(rows, 30, restore_norm=True)):
        assert float(found.double().norm() / row.double().norm()) == pytest.approx(1, abs=0.004)


def test_zeros_are_no_entries():
    found = topk.encode(sparse(100, (17, 3.0)), 10)
    assert found[1].count_nonzero() == 1
    nothing = topk.encode(torch.zeros(2, 100), 10)
    assert not nothing[1].any() and not nothing[2].any()
    assert not topk.decode(*nothing, 100).any()


def test_gaps_of_more_than_16_bits_take_a_filler():
    for first in (0, 65_535, 65_536, 2 * 65_536 + 5, WIDE - 1):
        row = sparse(WIDE, (first, 2.0))
        gaps, values, scales = topk.encode(row, 3)
        assert_same(topk.decode(gaps, values, scales, WIDE), row, 0.01)
        assert torch.count_nonzero(values) == 1
        assert int(topk.positions(gaps, values, WIDE).max()) < WIDE
    row = sparse(WIDE, (3, 1.0), (3 + 65_535, -1.0), (3 + 65_535 + 65_536, 0.5), (WIDE - 1, 0.25))
    gaps, values, scales = topk.encode(row, 6)
    assert (values[0] == 0).tolist() == [False, False, True, False, True, False]
    assert_same(topk.decode(gaps, values, scales, WIDE), row, 0.01)


def test_a_filler_takes_the_entry_of_the_smallest_coordinate():
    row = sparse(WIDE, (10, 4.0), (20, 1.0), (30, 2.0), (200_000, 3.0))
    found = coded(row, 4)
    assert found.nonzero()[:, 1].tolist() == [10, 30, 200_000]
    assert coded(row, 5).nonzero()[:, 1].tolist() == [10, 20, 30, 200_000]
    assert coded(row, 1).nonzero()[:, 1].tolist() == [10]
    assert not coded(sparse(WIDE, (200_000, 1.0)), 1).any(), "one entry is not enough for a gap that needs two"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, WIDE - 1), st.floats(0.1, 10), min_size=0, max_size=30), st.integers(1, 40))
def test_what_is_written_is_read_again(places, entries):
    row = sparse(WIDE, *places.items())
    gaps, values, scales = topk.encode(row, entries, restore_norm=False)
    found = topk.decode(gaps, values, scales, WIDE)[0]
    kept = found.nonzero().flatten().tolist()
    fillers = sum(b - a >= topk.STEP for a, b in zip([0, *kept], kept))
    assert len(kept) + fillers <= entries
    assert set(kept) <= set(places)
    scale = float(scales)
    assert all(abs(float(found[i]) - row[0, i]) <= 0.51 * scale for i in kept)
    by_size = sorted(places, key=lambda i: -float(row[0, i]))
    assert (
        not kept
        or min(row[0, i] for i in kept) >= max((row[0, i] for i in by_size if i not in kept), default=0)
        or (len(set(places.values())) < len(places))
    )
    if len(places) + sum(b - a >= topk.STEP for a, b in zip([0, *sorted(places)], sorted(places))) <= entries:
        assert len(kept) == len(places)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(entries, documents, seed):
    rows = torch.randn(documents, 70_000, generator=torch.Generator().manual_seed(seed))
    whole = topk.encode(rows, entries)
    for i in range(documents):
        for one, all_ in zip(topk.encode(rows[i : i + 1], entries), whole):
            assert torch.equal(one[0], all_[i])
