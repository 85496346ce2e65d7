"""Sums over integers: close to float64, and the same bits in any order; what does not fit is repeated."""

import pytest
import torch

import treering as tr
from tests.same import assert_same
from tests.zoo import build
from treering.curvature.exact_sums import ExactSum, bits_for

M = 12
SPREAD = torch.logspace(-4, 2, M, dtype=torch.float64)  # variances differ by twelve orders of magnitude


def batches(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(20 + 3 * i, M, generator=generator, dtype=torch.float64) * SPREAD).to(dtype) for i in range(count)
    ]


def summed(each, order=None, steps=None):
    first = ExactSum.empty((M, M), torch.device("cpu"), None)
    first.add(each[0])
    total = ExactSum.empty((M, M), torch.device("cpu"), steps or first.chosen(bits_for(len(each))))
    for i in order or range(len(each)):
        total.add(each[i])
    return total


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-11)], ids=str)
def test_every_element_is_as_close_as_the_products_are(dtype, tolerance):
    each = batches(9, dtype)
    total, tokens = summed(each).sum(())
    wanted = sum(x.double().mT @ x.double() for x in each)
    assert int(tokens) == sum(map(len, each))
    scale = wanted.diagonal().sqrt()
    assert_same(total / scale / scale[:, None], wanted / scale / scale[:, None], tolerance)


def test_the_order_does_not_matter_and_parts_add_up():
    each = batches(17)
    one = summed(each)
    other = summed(each, order=torch.randperm(17, generator=torch.Generator().manual_seed(1)).tolist())
    assert torch.equal(one.total, other.total)
    parts = [summed(each, order=part, steps=one.steps) for part in (range(0, 17, 2), range(1, 17, 2))]
    assert torch.equal(parts[0].total + parts[1].total, one.total)


def test_a_batch_beyond_the_grid_is_noticed_and_the_second_grid_fits_all():
    each = batches(8)
    each[5] = each[5] * 100
    larger = summed(each).larger_steps("w", ())
    again = summed(each, steps=larger)
    assert again.larger_steps("w", ()) is None
    wanted = sum(x.double().mT @ x.double() for x in each)
    scale = wanted.diagonal().sqrt()
    assert_same(again.sum(())[0] / scale / scale[:, None], wanted / scale / scale[:, None], 3e-6)
    assert summed(batches(8)).larger_steps("w", ()) is None


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
def test_what_is_not_finite_is_named(value):
    each = batches(3)
    each[1][4, 2] = value
    with pytest.raises(tr.NumericsError, match="up_proj"):
        summed(each).larger_steps("up_proj", ())


def test_channels_without_a_value_in_the_first_batch_share_the_range_of_the_others():
    each = batches(4)
    each[0][:, 3:5] = 0
    total = summed(each)
    assert total.larger_steps("w", ()) is not None or total.steps.rows[3] >= total.steps.rows.max() - 11
    assert summed([torch.zeros(2, M), *each]).larger_steps("w", ()) is not None


def test_a_measurement_whose_later_text_has_much_larger_inputs_is_repeated():
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:64] *= 1e-6  # norms are no help: eps is larger than such inputs
    small, large = torch.arange(3, 40)[None], torch.arange(70, 120)[None]
    steps = []
    forwards = tr.measure(model, [{"input_ids": small}, {"input_ids": large}], progress=lambda *at: steps.append(at))
    backwards = tr.measure(model, [{"input_ids": large}, {"input_ids": small}])
    assert len(steps) == 4 and len(set(steps)) == 2  # both batches twice
    for weight in forwards:
        assert_same(forwards[weight]["inputs"], backwards[weight]["inputs"], 1e-6, weight)


@pytest.mark.parametrize("seed", range(3))
def test_terms_that_are_not_symmetric_are_summed_to_the_same_bits(seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None] * torch.logspace(2, -4, 7, dtype=torch.float64)
    each = [torch.rand(5, 7, generator=generator, dtype=torch.float64) * scale for _ in range(30)]
    first = ExactSum.empty((5, 7), torch.device("cpu"), None, symmetric=False)
    first.add_term(each[0], 1)
    sums = []
    for order in (range(30), reversed(range(30))):
        total = ExactSum.empty((5, 7), torch.device("cpu"), first.chosen(bits_for(30)), symmetric=False)
        for i in order:
            total.add_term(each[i], 1)
        assert total.larger_steps("w", ()) is None
        sums.append(total.sum(())[0])
    assert torch.equal(*sums)
    assert_same(sums[0] / scale, sum(each) / scale, 1e-10)
