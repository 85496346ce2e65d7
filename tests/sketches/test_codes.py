"""Few bits: close to the numbers, zeros stay zeros, and nothing vanishes or overflows at any size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.same import assert_same
from tests.sketches.toy import normal
from treering.sketches import codes, reference

STORAGES = ("int8", "int4", "float16", "float32")


def test_codes_are_those_of_the_reference():
    rows = normal(5, 33) * torch.logspace(-6, 3, 5)[:, None]
    for row, found in zip(rows, codes.decode(*codes.encode(rows, "int8"), 33, "int8")):
        assert_same(found, reference.coded(row, 127), 1e-6)


@pytest.mark.parametrize(("storage", "tolerance"), [("int8", 0.005), ("int4", 0.3), ("float16", 5e-4), ("float32", 0)])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_every_number_is_close_whatever_its_size(storage, tolerance, size):
    rows = normal(7, 40) * size
    encoded, scales = codes.encode(rows, storage)
    assert encoded.dtype == codes.DTYPES[storage] and encoded.shape == (7, codes.width(40, storage))
    for one, other in zip(codes.decode(encoded, scales, 40, storage), rows):
        assert_same(one, other, tolerance)


def test_int4_clips_what_is_rare_for_the_sake_of_the_rest():
    rows = normal(6, 3000) ** 3
    wide = torch.stack([reference.coded(row, 7) for row in rows])
    found = codes.decode(*codes.encode(rows, "int4"), 3000, "int4")
    errors = [(x - rows).norm(dim=1) / rows.norm(dim=1) for x in (found, wide)]
    assert (errors[0] < 0.85 * errors[1]).all(), errors
    few = torch.tensor([[7.0, -3, 1, 0, 5, 2]])  # all of them are codes
    assert_same(codes.decode(*codes.encode(few, "int4"), 6, "int4"), few, 0.005)


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_of_zeros_and_empty_rows_stay_what_they_are(storage):
    rows = torch.zeros(3, 5)
    rows[1, 2] = -4
    found = codes.decode(*codes.encode(rows, storage), 5, storage)
    assert not found[0].any() and not found[2].any() and found[1].nonzero().tolist() == [[2]]
    assert codes.encode(torch.zeros(0, 5), storage)[0].shape == (0, codes.width(5, storage))


@given(st.floats(1e-37, 1e37))
def test_scales_are_the_next_bfloat16_above(value):
    wanted = torch.tensor([[value]], dtype=torch.float32)
    scale = codes.scales_of(wanted, 127)
    below = torch.nextafter(scale, torch.zeros_like(scale))
    assert scale.float() >= wanted[0] / 127 > below.float()


def test_the_largest_number_keeps_its_code():
    """A scale that is rounded down would need the code 128."""
    rows = torch.rand(4000, 2) + 0.01
    encoded, _ = codes.encode(rows, "int8")
    assert encoded.abs().amax() <= 127 and encoded.abs().amax(1).min() >= 126


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_does_not_depend_on_its_neighbours(storage):
    rows = normal(6, 21)
    encoded, scales = codes.encode(rows, storage)
    for i in range(6):
        one, scale = codes.encode(rows[i : i + 1], storage)
        assert torch.equal(one[0], encoded[i]) and torch.equal(scale[0], scales[i])
