"""A check of scores that needs no retraining: is a training document found again by its own second half?

Half of a document is a query whose source is known. BM25 finds it nearly always, as its words are rare; scores that do
so worse than BM25 are mostly noise. That they do it well does not show that they are good: see `validate`.
"""

import heapq
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import DataError
from treering.core.seeds import derive
from treering.influence.bm25 import TokenLists

_CHANCE = 0.05  # a difference that chance alone makes at least so often is no warning


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Queries that are halves of training documents.

    Attributes:
        sources: [queries], the row of the document that each is from.
        queries: the second half of its tokens.
        copies: for each query, the rows of all documents with the same tokens as its source.
    """

    sources: NDArray[np.int64]
    queries: TokenLists
    copies: tuple[NDArray[np.int64], ...]

    def ranks(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Return the rank of each query's source in scores [documents, queries], from 1.

        Among documents with the source's score it has the middle place, so that constant scores do not look good.
        Copies of the source do not count.
        """
        if scores.shape[1] != len(self.sources):
            raise ValueError(f"scores for {scores.shape[1]} queries; the probe has {len(self.sources)}")
        ranks = np.zeros(len(self.sources))
        for q, (source, copies) in enumerate(zip(self.sources, self.copies)):
            column = scores[:, q]
            others = np.ones(len(column), dtype=np.bool_)
            others[copies] = False
            better, equal = (column > column[source]) & others, (column == column[source]) & others
            ranks[q] = 1 + better.sum() + equal.sum() / 2
        return ranks


def make_probe(documents: TokenLists, *, number: int = 32, seed: int = 0, shortest: int = 16) -> Probe:
    """Return a probe of `number` documents, or of all that have at least `shortest` tokens, if they are fewer.

    Which ones depends on the seed and the number of each document.
    """
    offsets = np.asarray(documents.offsets)
    long = np.flatnonzero(np.diff(offsets) >= shortest).tolist()
    if not long:
        raise DataError(f"no document has {shortest} tokens, so no half of one can be a query; lower `shortest`")
    sources = sorted(heapq.nsmallest(number, long, key=lambda row: derive(seed, "probe", row)))
    halves = [documents.ids[(offsets[row] + offsets[row + 1] + 1) // 2 : offsets[row + 1]] for row in sources]
    copies = tuple(_copies(documents, row) for row in sources)
    return Probe(sources=np.array(sources), queries=TokenLists.of(halves), copies=copies)


def _copies(documents: TokenLists, row: int) -> NDArray[np.int64]:
    """Return the rows of all documents with the tokens of document `row`, itself included."""
    ids, offsets = documents.ids, np.asarray(documents.offsets)
    length = int(offsets[row + 1] - offsets[row])
    alike = np.flatnonzero(np.diff(offsets) == length)
    for place in {0, length // 3, length // 2, length - 1}:  # most documents differ in one of these
        alike = alike[np.asarray(ids[offsets[alike] + place]) == ids[offsets[row] + place]]
    own = ids[offsets[row] : offsets[row + 1]]
    return np.array([i for i in alike if np.array_equal(ids[offsets[i] : offsets[i + 1]], own)], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Ranks of the sources of a probe by the scores of an index and by BM25."""

    ranks: NDArray[np.float64]
    baseline: NDArray[np.float64]
    documents: int

    @property
    def worse(self) -> bool:
        """Whether the index does worse than BM25: a lower mean reciprocal rank, and more losses than chance makes."""
        losses, wins = int((self.ranks > self.baseline).sum()), int((self.ranks < self.baseline).sum())
        tosses = losses + wins
        by_chance = sum(comb(tosses, k) for k in range(losses, tosses + 1)) / 2**tosses
        return reciprocal(self.ranks) < reciprocal(self.baseline) and by_chance < _CHANCE

    @property
    def warning(self) -> str | None:
        """The warning for the user, or None."""
        if not self.worse:
            return None
        means, medians = ([of(one) for one in (self.ranks, self.baseline)] for of in (reciprocal, np.median))
        return (
            f"the index finds documents by their second half worse than BM25, which counts words: mean reciprocal rank "
            f"{means[0]:.2f} against {means[1]:.2f}, median rank {medians[0]:,.0f} against {medians[1]:,.0f} of "
            f"{self.documents:,}, {len(self.ranks)} queries. Its scores are mostly noise: give the index more numbers "
            "a document, or measure the curvature on more text"
        )


def reciprocal(ranks: NDArray[np.float64]) -> float:
    """Return the mean of 1 / rank: 1 if every source comes first."""
    return float(np.mean(1 / ranks))
