"""Documents found again by their halves: ranks, copies, and when a warning is due."""

import numpy as np
import pytest

from tests.influence.test_bm25 import texts
from treering.core.errors import DataError
from treering.influence.bm25 import TokenLists, bm25
from treering.influence.probe import ProbeResult, make_probe

DOCUMENTS = TokenLists.of(texts(300, length=80, vocabulary=4000))


def test_a_query_is_the_second_half_of_its_document():
    probe = make_probe(DOCUMENTS, number=20)
    assert len(probe.sources) == 20 and len(set(probe.sources.tolist())) == 20
    for q, source in enumerate(probe.sources):
        tokens = DOCUMENTS.ids[DOCUMENTS.offsets[source] : DOCUMENTS.offsets[source + 1]]
        half = probe.queries.ids[probe.queries.offsets[q] : probe.queries.offsets[q + 1]]
        assert len(tokens) >= 16 and half.tolist() == tokens[(len(tokens) + 1) // 2 :].tolist()


def test_the_seed_decides_which_documents():
    assert (make_probe(DOCUMENTS).sources == make_probe(DOCUMENTS).sources).all()
    assert make_probe(DOCUMENTS, seed=1).sources.tolist() != make_probe(DOCUMENTS).sources.tolist()
    few = make_probe(TokenLists.of([[1] * 20, [2] * 3, [3] * 16]))
    assert few.sources.tolist() == [0, 2]
    with pytest.raises(DataError, match="no document has 16 tokens"):
        make_probe(TokenLists.of([[1, 2]]))


def test_bm25_finds_nearly_all_and_random_scores_find_none():
    probe = make_probe(DOCUMENTS)
    ranks = probe.ranks(bm25(DOCUMENTS, probe.queries))
    assert np.median(ranks) == 1 and ranks.max() < 20
    noise = np.random.default_rng(0).normal(size=(300, 32))
    assert 75 < probe.ranks(noise).mean() < 225


def test_equal_scores_have_the_middle_rank_and_copies_do_not_count():
    lists = texts(6, seed=4, length=40)
    lists = [np.concatenate([one, np.arange(20)]) for one in lists]
    documents = TokenLists.of([*lists, lists[2], lists[2]])
    probe = make_probe(documents, number=8)
    assert (probe.ranks(np.zeros((8, 8))) == [4.5, 4.5, 3.5, 4.5, 4.5, 4.5, 3.5, 3.5]).all()
    assert [copies.tolist() for copies in probe.copies][2] == [2, 6, 7]
    scores = np.zeros((8, 8))
    scores[[2, 6, 7]] = 1.0
    assert probe.ranks(scores)[[2, 6, 7]].tolist() == [1.0, 1.0, 1.0]


def test_scores_worse_than_bm25_are_warned_about():
    good, bad = np.ones(32), np.full(32, 150.0)
    warning = ProbeResult(ranks=bad, baseline=good, documents=300).warning
    assert warning is not None and "rank 0.01 against 1.00, median rank 150 against 1 of 300" in warning
    assert ProbeResult(ranks=good, baseline=bad, documents=300).warning is None
    assert ProbeResult(ranks=good, baseline=good, documents=300).warning is None


def test_a_difference_that_chance_makes_is_no_warning():
    good = np.ones(32)
    for losses, worse in ((1, False), (4, False), (5, True), (32, True)):
        ranks = good.copy()
        ranks[:losses] = 2
        assert ProbeResult(ranks=ranks, baseline=good, documents=300).worse == worse
    with pytest.raises(ValueError, match="for 3 queries; the probe has 32"):
        make_probe(DOCUMENTS).ranks(np.zeros((300, 3)))
