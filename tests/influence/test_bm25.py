"""BM25 on token ids against its formula; what it must not depend on; what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.influence import reference
from treering.core.errors import ConfigError, DataError
from treering.influence import bm25 as module
from treering.influence.bm25 import TokenLists, bm25

LISTS = st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=8)
QUERIES = st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=6), min_size=1, max_size=3)


def texts(number: int, seed: int = 0, length: int = 60, vocabulary: int = 500) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.zipf(1.3, random.integers(1, length)) % vocabulary for _ in range(number)]


@settings(deadline=None, max_examples=60)
@given(LISTS, QUERIES, st.sampled_from([0.0, 0.9, 1.2, 5.0]), st.sampled_from([0.0, 0.4, 0.75, 1.0]))
def test_scores_are_those_of_the_formula(documents, queries, k1, b):
    if not any(documents):
        return
    scores = bm25(TokenLists.of(documents), TokenLists.of(queries), k1=k1, b=b)
    expected = np.array(reference.bm25(documents, queries, k1, b))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("tokens, cells", [(1, 1), (40, 1 << 20), (1 << 20, 100), (300, 5000)])
def test_blocks_do_not_change_a_bit(monkeypatch, tokens, cells):
    documents, queries = TokenLists.of(texts(80)), TokenLists.of(texts(4, seed=1))
    once = bm25(documents, queries)
    monkeypatch.setattr(module, "_TOKENS", tokens)
    monkeypatch.setattr(module, "_CELLS", cells)
    assert np.array_equal(once, bm25(documents, queries)) and once.any()


def test_equal_documents_have_equal_scores_wherever_they_are(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", 100)
    lists = texts(40)
    scores = bm25(TokenLists.of([*lists, *lists[::-1], *lists[5:9]]), TokenLists.of(texts(3, seed=2)))
    assert np.array_equal(scores[:40], scores[40:80][::-1]) and np.array_equal(scores[80:], scores[5:9])


def test_a_query_has_the_scores_that_it_has_alone():
    documents, queries = TokenLists.of(texts(50)), texts(5, seed=3)
    together = bm25(documents, TokenLists.of(queries))
    for q, query in enumerate(queries):
        assert np.array_equal(together[:, q], bm25(documents, TokenLists.of([query]))[:, 0])


def test_documents_without_a_token_of_the_query_or_without_tokens_have_score_0():
    scores = bm25(TokenLists.of([[1, 2], [], [3], [2, 2, 9], []]), TokenLists.of([[2, 70_000], [5]]))
    assert (scores[[1, 2, 4]] == 0).all() and (scores[:, 1] == 0).all() and scores[3, 0] > scores[0, 0] > 0
    assert not bm25(TokenLists.of([[], []]), TokenLists.of([[1]])).any()


def test_no_score_is_below_0_although_a_token_is_in_every_document():
    assert (bm25(TokenLists.of([[1, 2], [1], [1, 3]]), TokenLists.of([[1]])) > 0).all()


def test_the_memory_map_of_a_token_cache_is_read(tmp_path):
    ids = np.memmap(tmp_path / "ids", "<u4", "w+", shape=(6,))
    ids[:] = [4, 5, 6, 4, 4, 9]
    documents = TokenLists(ids=ids, offsets=np.array([0, 3, 5, 6]))
    expected = bm25(TokenLists.of([[4, 5, 6], [4, 4], [9]]), TokenLists.of([[4]]))
    assert np.array_equal(bm25(documents, TokenLists.of([[4]])), expected)


@pytest.mark.parametrize(
    "documents, queries, options, error, words",
    [
        ([[1]], [[1], []], {}, DataError, "query 2 has no token"),
        ([[1]], [], {}, DataError, "no query"),
        ([], [[1]], {}, DataError, "no document"),
        ([[1]], [[1]], {"k1": -1}, ConfigError, "k1 is -1"),
        ([[1]], [[1]], {"k1": float("nan")}, ConfigError, "k1 is nan"),
        ([[1]], [[1]], {"b": 1.5}, ConfigError, "b is 1.5"),
    ],
)
def test_what_cannot_be_scored_is_refused(documents, queries, options, error, words):
    with pytest.raises(error, match=words):
        bm25(TokenLists.of(documents), TokenLists.of(queries), **options)


def test_offsets_that_do_not_fit_are_refused():
    for offsets in ([0, 2], [1, 3], [0, 3, 1, 3], []):
        with pytest.raises(ValueError, match="offsets"):
            TokenLists(ids=np.arange(3), offsets=np.array(offsets, dtype=np.int64))


def test_documents_may_be_shorter_than_a_token_on_average():
    documents, queries = [[], [1]], [[1]]
    scores = bm25(TokenLists.of(documents), TokenLists.of(queries), k1=0.9, b=0.4)
    np.testing.assert_allclose(scores, reference.bm25(documents, queries, 0.9, 0.4), rtol=2e-7)
