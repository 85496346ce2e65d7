"""Scores against retraining, on cases whose answer is known."""

import itertools

import numpy as np
import pytest
import torch

import treering as tr
from treering.influence.lds import (
    Retrained,
    chance,
    lds,
    leave_top_k_out,
    paired_difference,
    precision_at,
    ranks,
    recall_at,
    spearman,
    steadiness,
    top,
)

QUERIES, DOCUMENTS, SUBSETS = 6, 20, 60


def halves(subsets: int = SUBSETS, documents: int = DOCUMENTS, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(documents) < documents // 2 for _ in range(subsets)])


def world(noise: float = 0.0, seed: int = 0):
    """Scores of each document, and what retraining gives where every document moves the loss by exactly its score."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(QUERIES, DOCUMENTS))
    subsets = halves(seed=seed)
    losses = 3.0 - subsets @ scores.T
    return scores, Retrained(subsets, losses + noise * random.normal(size=losses.shape))


def test_where_losses_are_linear_in_the_documents_the_lds_is_one():
    scores, retrained = world()
    found = lds(scores, retrained, draws=50)
    assert np.allclose(found.by_query, 1) and found.value == pytest.approx(1) and found.error == pytest.approx(0)
    assert lds(-scores, retrained, draws=1).value == pytest.approx(-1)  # the sign: a positive score lowers the loss


def test_influence_of_ridge_regression_predicts_retraining_and_the_gradient_alone_does_less():
    """A real trainer: least squares with a ridge; −dloss/dweight of a document from the closed form."""
    random = np.random.default_rng(3)
    documents, stretch = 100, np.array([4.0, 1.0, 1.0, 0.2])
    X, test = random.normal(size=(documents, 4)) * stretch, random.normal(size=(QUERIES, 4)) * stretch
    truth = random.normal(size=4)
    y, t = X @ truth + random.normal(size=documents), test @ truth + random.normal(size=QUERIES)

    def trained(weights):
        return np.linalg.solve((X.T * weights) @ X + np.eye(4), (X.T * weights) @ y)

    middle = trained(np.full(documents, 0.5))
    gradients = X * (y - X @ middle)[:, None]
    query = (t - test @ middle)[:, None] * test
    influence = query @ np.linalg.solve(0.5 * X.T @ X + np.eye(4), gradients.T)
    subsets = halves(documents=documents)
    retrained = Retrained(subsets, [0.5 * (t - test @ trained(one.astype(float))) ** 2 for one in subsets])
    assert lds(influence, retrained, draws=1).value > 0.9
    assert paired_difference(influence, query @ gradients.T, retrained, draws=200).low > 0


def test_tied_values_share_the_mean_of_their_ranks():
    assert ranks([[3, 1, 3, 2], [5, 5, 5, 5]]).tolist() == [[3.5, 1, 3.5, 2], [2.5, 2.5, 2.5, 2.5]]
    assert ranks([-0.0, 0.0]).tolist() == [1.5, 1.5]


def test_ranks_are_those_of_counting():
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        x = random.integers(0, max(2, size // 2), size)
        counted = [(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x]
        assert ranks(x).tolist() == counted


def test_spearman_is_the_textbook_formula_where_nothing_is_tied():
    for y in itertools.permutations(range(5)):
        d = np.arange(5) - np.array(y)
        assert spearman(np.arange(5), np.array(y)) == pytest.approx(1 - 6 * (d * d).sum() / (5 * 24))


def test_spearman_with_ties_is_the_correlation_of_ranks_and_zero_for_a_constant():
    x, y = [1, 2, 2, 4], [1, 3, 2, 4]
    assert spearman(x, y) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_chance_is_that_of_independent_queries_or_of_one_where_all_are_alike():
    """ρ of a permutation has the variance 1/(M − 1)."""
    scores, retrained = world()
    random = np.random.default_rng(9).normal(size=scores.shape)
    assert chance(random, retrained) == pytest.approx((SUBSETS - 1) ** -0.5 * QUERIES**-0.5, rel=0.15)
    alike = Retrained(retrained.subsets, np.repeat(retrained.losses[:, :1], QUERIES, 1))
    assert chance(np.repeat(random[:1], QUERIES, 0), alike) == pytest.approx((SUBSETS - 1) ** -0.5, rel=0.15)


def test_scores_that_know_nothing_have_an_lds_within_the_noise_of_chance():
    scores, retrained = world()
    noise = chance(scores, retrained, draws=200)
    values = [
        lds(scores, Retrained(retrained.subsets, retrained.losses[one]), draws=1).value
        for one in (np.random.default_rng(i).permutation(SUBSETS) for i in range(40))
    ]
    assert abs(np.mean(values)) < 3 * noise / np.sqrt(40)
    assert np.std(values) == pytest.approx(noise, rel=0.4)


def test_a_constant_score_of_a_query_counts_as_knowing_nothing_of_it():
    scores, retrained = world()
    scores[0] = 0
    found = lds(scores, retrained, draws=1)
    assert found.by_query[0] == 0 and found.value == pytest.approx(1 - 1 / QUERIES)


def test_the_error_is_what_other_subsets_and_queries_would_give():
    values, errors = [], []
    for seed in range(30):
        scores, retrained = world(noise=3.0, seed=seed)
        found = lds(scores, retrained, draws=100)
        assert found.low < found.value < found.high
        values.append(found.value)
        errors.append(found.error)
    assert 0.5 < np.std(values) / np.mean(errors) < 1.6


def test_the_paired_error_is_smaller_than_that_of_two_separate_ones():
    scores, retrained = world(noise=3.0)
    near = scores + 0.2 * np.random.default_rng(1).normal(size=scores.shape)
    found = paired_difference(scores, near, retrained, draws=300)
    one, other = lds(scores, retrained, draws=300), lds(near, retrained, draws=300)
    assert found.value == pytest.approx(one.value - other.value)
    assert found.error < 0.6 * np.hypot(one.error, other.error)
    same = paired_difference(scores, scores, retrained, draws=20)
    assert (same.value, same.error, same.low, same.high) == (0, 0, 0, 0)
    assert paired_difference(scores, -scores, retrained, draws=300).low > 0


def test_numbers_are_a_function_of_the_seed():
    scores, retrained = world(noise=3.0)
    one, again, other = (lds(scores, retrained, draws=50, seed=seed) for seed in (0, 0, 1))
    assert one.error == again.error != other.error


def test_tensors_are_taken_as_arrays_are():
    scores, retrained = world(noise=1.0)
    given = Retrained(torch.from_numpy(retrained.subsets), torch.from_numpy(retrained.losses))
    assert lds(torch.from_numpy(scores), given, draws=5).value == lds(scores, retrained, draws=5).value


def test_more_subsets_are_steadier():
    scores, retrained = world(noise=3.0)
    few, more, every = (steadiness(scores, retrained, n) for n in (10, 40, SUBSETS))
    assert few > more > every == pytest.approx(0)


def test_leaving_out_the_top_is_compared_with_leaving_out_as_many_at_random():
    full, without_top = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.4, 3.6])
    random = np.stack([full + 0.1, full + 0.3])
    found = leave_top_k_out(full, without_top, random)
    assert np.allclose(found.by_query, [0.3, 0.2, 0.4]) and found.value == pytest.approx(0.3)
    assert 0.19 < found.low < 0.3 < found.high < 0.41


def test_the_top_of_equal_scores_is_the_earlier_document():
    assert top([[1.0, 3.0, 3.0, 2.0]], 3).tolist() == [[1, 2, 3]]


def test_planted_documents_are_counted_in_the_top():
    scores, planted = [[5.0, 4.0, 3.0, 2.0, 1.0]], [True, False, True, False, False]
    assert [precision_at(scores, planted, k)[0] for k in (1, 2, 3)] == pytest.approx([1, 1 / 2, 2 / 3])
    assert [recall_at(scores, planted, k)[0] for k in (1, 2, 3)] == pytest.approx([1 / 2, 1 / 2, 1])


def test_ties_at_the_cut_give_the_mean_over_their_orders():
    planted = np.array([True, False, False, True, False])
    constant = np.zeros((1, 5))
    for k in range(1, 6):
        assert precision_at(constant, planted, k)[0] == pytest.approx(2 / 5)
    scores = np.array([[3.0, 2.0, 2.0, 2.0, 1.0]])
    orders = [planted[[0, *middle][:3]].mean() for middle in itertools.permutations([1, 2, 3])]
    assert precision_at(scores, planted, 3)[0] == pytest.approx(np.mean(orders))


def refused(message, call, *arguments, **more):
    with pytest.raises(tr.DataError, match=message):
        call(*arguments, **more)


def test_tables_that_do_not_fit_are_refused():
    scores, retrained = world()
    spoiled = scores.copy()
    spoiled[2, 7] = np.nan
    refused("first at query 2, document 7: nan", lds, spoiled, retrained)
    refused(r"here \[6, 20\] as retrained; given: \[20, 6\]", lds, scores.T, retrained)
    refused("true and false", Retrained, retrained.subsets.astype(int), retrained.losses)
    refused("60 subsets and losses of 59", Retrained, retrained.subsets, retrained.losses[1:])
    refused("loss of query 0 is the same", Retrained, retrained.subsets, np.ones((SUBSETS, 2)))
    refused("one axis for each query and document", lds, scores[0], retrained)
    refused("the top 21 of 20", top, scores, 21)
    refused("61 of 60 subsets", steadiness, scores, retrained, 61)
    planted = np.eye(QUERIES, DOCUMENTS, dtype=bool)
    planted[1] = False
    refused("nothing is planted for query 1", recall_at, scores, planted, 2)
    refused("at least one draw", leave_top_k_out, [1.0], [1.0], np.zeros((0, 1)))
