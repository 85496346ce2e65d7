"""Projections: unbiased with one constant for every shape, and the same entries whatever is around them."""

import math

import pytest
import torch

from tests.ranks import on_ranks
from treering.core.projection import projection

NAME = "model.layers.0.mlp.up_proj.weight"
DISTRIBUTIONS = ("rademacher", "normal")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_smaller_projection_is_the_corner_of_a_larger_one(distribution):
    large = projection(3, NAME, "inputs", 12, 70, distribution=distribution) * math.sqrt(12)
    for rows, columns in ((12, 33), (5, 70), (1, 1), (7, 64)):
        small = projection(3, NAME, "inputs", rows, columns, distribution=distribution) * math.sqrt(rows)
        assert torch.allclose(small, large[:rows, :columns], rtol=1e-6, atol=0)


def test_signs_are_the_corner_bit_for_bit():
    large = projection(3, NAME, "inputs", 16, 100)
    assert torch.equal(projection(3, NAME, "inputs", 4, 50).sign(), large[:4, :50].sign())
    assert set((large * 4).flatten().tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_seed_name_and_side_each_make_another_projection(distribution):
    made = [
        projection(*of, 8, 40, distribution=distribution)
        for of in ((0, NAME, "inputs"), (1, NAME, "inputs"), (0, NAME + "2", "inputs"), (0, NAME, "gradients"))
    ]
    products = torch.stack([m.flatten() for m in made]) @ torch.stack([m.flatten() for m in made]).T / 40
    assert (products - torch.eye(4)).abs().max() < 0.3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (16, 9), (3, 40)])
def test_products_of_projected_vectors_are_unbiased_for_every_shape(rows, columns, distribution):
    x, y = torch.randn(2, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    R = torch.stack([projection(s, NAME, "inputs", rows, columns, distribution=distribution) for s in range(1500)])
    found = ((R.double() @ x) * (R.double() @ y)).sum(1)
    error = (found.mean() - x @ y).abs() / (found.std() / math.sqrt(len(found)))
    assert error < 4, f"{float(error):.1f} sigma away"


def entries_on_a_rank():
    return projection(0, NAME, "gradients", 8, 50), projection(0, NAME, "gradients", 8, 50, distribution="normal")


def test_ranks_and_threads_do_not_change_it():
    mine = entries_on_a_rank()
    for theirs in on_ranks(2, entries_on_a_rank):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
