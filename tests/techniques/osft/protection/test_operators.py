"""Complement operators: the thin way, the wide way and the soft way are the matrices they stand for."""

import pytest
import torch

from tests.same import assert_same
from treering.core.seeds import generator
from treering.techniques.osft import OSFT, reference
from treering.techniques.osft.protection.decompose import eigen, svd
from treering.techniques.osft.protection.operators import Operator, OperatorShape, from_inputs, identity


def orthonormal(size, columns, *lead):
    X = torch.randn(*lead, size, size, dtype=torch.float64, generator=generator(0, "Q", size))
    return torch.linalg.qr(X)[0][..., :columns]


@pytest.mark.parametrize("columns", [0, 1, 6, 7])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_an_operator_is_its_matrix_from_both_ends(columns, lead):
    Q = orthonormal(7, columns, *lead)
    values = torch.rand(*lead, columns, dtype=torch.float64, generator=generator(1))
    for rest in (0.0, 1.0):
        P = rest * (torch.eye(7, dtype=torch.float64) - Q @ Q.mT) + (Q * values[..., None, :]) @ Q.mT
        operator = Operator(Q, values, rest)
        X = torch.randn(*lead, 5, 7, dtype=torch.float64, generator=generator(2))
        assert_same(operator.right(X), X @ P, 1e-12)
        assert_same(operator.left(X.mT), P @ X.mT, 1e-12)
        assert_same(operator.combine(X.mT, operator.coefficients(X.mT)), P @ X.mT, 1e-12)
    assert_same(Operator(Q, values, 0.0).inside(X) @ Q.mT, X @ ((Q * values[..., None, :]) @ Q.mT), 1e-12)


@pytest.mark.parametrize("shape", [(9, 9), (5, 21), (21, 5), (1, 8), (8, 1), (1, 1), (3, 6, 14), (2, 40, 5)])
def test_singular_triples_rebuild_any_shape(shape):
    W = torch.randn(*shape, generator=generator(3, *shape))
    U, S, V = svd(W)
    assert_same((U * S[..., None, :]) @ V.mT, W, 2e-6)
    eye = torch.eye(S.shape[-1])
    assert_same(U.mT @ U, eye.expand_as(U.mT @ U), 2e-6)
    assert_same(V.mT @ V, eye.expand_as(V.mT @ V), 2e-6)
    assert bool((S.diff(dim=-1) <= 1e-6 * S[..., :1]).all())


@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (8, 8)])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_weights_of_low_rank_and_extreme_size_stay_finite_and_orthonormal(shape, size):
    low = torch.randn(shape[0], 2, generator=generator(4)) @ torch.randn(2, shape[1], generator=generator(5))
    for W in (low * size, torch.zeros(shape)):
        U, S, V = svd(W)
        assert_same((U * S) @ V.mT, W, 2e-6)
        for basis in (U, V):
            assert_same(basis.mT @ basis, torch.eye(6 if 6 in shape else 8), 5e-6)


def test_the_gram_way_finds_the_same_leading_subspaces():
    W = torch.randn(24, 96, generator=generator(6)) @ torch.diag(torch.logspace(0, -3, 96))
    U, _, V = svd(W)
    exact_U, _, exact_Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for held in (1, 6, 18, 23):
        for found, exact in ((U, exact_U), (V, exact_Vh.mT)):
            one, other = found[:, :held].double(), exact[:, :held]
            sines = torch.linalg.svdvals(one - other @ (other.mT @ one))  # cosines cannot tell small angles apart
            assert float(sines.max()) < 1e-5


@pytest.mark.parametrize("held", [0, 1, 5, 11, 12])
def test_soft_protection_is_its_formula(held):
    X = torch.randn(50, 12, dtype=torch.float64, generator=generator(7)) * torch.logspace(0, -2, 12)
    A = X.mT @ X / 50
    side = OperatorShape(end="in", size=12, columns=held, thin=False, source="inputs", soft=True)
    Q, values = from_inputs(side, 0.01, A)
    assert_same(Operator(Q, values, 1.0).matrix(), reference.protect_softly(A, held, 0.01), 1e-9)


def test_soft_protection_can_be_cut_to_its_open_end():
    X = torch.randn(50, 12, dtype=torch.float64, generator=generator(7)) * torch.logspace(0, -2, 12)
    A = X.mT @ X / 50
    Q, values = from_inputs(OperatorShape(end="in", size=12, columns=4, thin=True, source="inputs", soft=True), 0.01, A)
    energy, basis = eigen(A)
    openness = 1 / (energy / energy.mean() + 0.01)
    assert_same(values, (openness / openness.max())[-4:], 1e-9)
    assert_same(Q @ Q.mT, basis[:, -4:] @ basis[:, -4:].mT, 1e-9)


def test_an_expert_that_saw_nothing_is_held_nowhere():
    Q, values = from_inputs(
        OperatorShape(end="in", size=5, columns=3, thin=False, source="inputs", soft=True), 0.01, torch.zeros(2, 5, 5)
    )
    assert torch.equal(values, torch.ones(2, 3, dtype=torch.float64))
    assert bool(torch.isfinite(Q).all())


def test_results_that_were_prepared_by_earlier_versions_are_still_found():
    """The text by which they are found, as it was written when the first were prepared."""
    shape = OperatorShape(end="in", size=5, columns=3, thin=False, source="inputs", soft=True)
    assert identity(OSFT(form="update"), (shape,)) == (
        "osft update soften 0.01 (Side(end='in', size=5, columns=3, thin=False, source='inputs', soft=True),)"
    )
