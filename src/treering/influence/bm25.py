"""BM25 on token ids: how much the words of a query occur in each document. The baseline of every influence score.

    score(q, n) = Σ_t∈q  idf(t) · f(t, n) · (k1 + 1) / (f(t, n) + k1 · (1 − b + b · L_n / mean L))
    idf(t)      = ln(1 + (N − d(t) + ½) / (d(t) + ½))

f(t, n): how often token t is in document n; d(t): documents with t; L_n: tokens of n; N: documents. A token that is
twice in the query counts twice. With the 1 in idf no token lowers a score.

Documents are read in blocks, twice: for d, then for the scores. Only tokens of queries are counted, so memory does not
grow with the documents, apart from the result. A score is a sum in fp64 in the order of the token ids, whatever block
its document is in: equal documents have equal scores, to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import ConfigError, DataError
from treering.influence.records import IndexedSource, as_json
from treering.influence.scores import ScoreTable

if TYPE_CHECKING:
    from treering.data.examples import Examples

_TOKENS = 1 << 20  # of a block of documents; its arrays stay in a processor's cache or close to it
_CELLS = 1 << 20  # documents × tokens of queries of a block


@dataclass(frozen=True, kw_only=True)
class TokenLists:
    """Many lists of token ids in one array.

    Attributes:
        ids: the tokens of all lists, one list behind the other; may be a memory map.
        offsets: [lists + 1]; list i is ids[offsets[i] : offsets[i + 1]].
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        ends = np.asarray(self.offsets)
        if ends.ndim != 1 or not len(ends) or ends[0] != 0 or ends[-1] != len(self.ids) or (np.diff(ends) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the {len(self.ids)} tokens that there are")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | NDArray[Any]]) -> "TokenLists":
        """Return lists of token ids as one value."""
        lengths = [len(ids) for ids in lists]
        joined = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in lists]) if lists else np.zeros(0, np.int64)
        return cls(ids=joined, offsets=np.cumsum([0, *lengths], dtype=np.int64))

    @classmethod
    def of_examples(cls, examples: "Examples") -> "TokenLists":
        """Return the documents of a training set, still in their memory map."""
        ids, offsets = examples.tokens()
        return cls(ids=ids, offsets=offsets)


def bm25(documents: TokenLists, queries: TokenLists, *, k1: float = 1.2, b: float = 0.75) -> NDArray[np.float32]:
    """Return the BM25 scores [documents, queries].

    Args:
        documents: tokens of each training document.
        queries: tokens of each query.
        k1: how soon another occurrence of a token stops counting; 0: it only matters whether a token occurs.
        b: how much long documents are put at a disadvantage: 0 not at all, 1 in proportion to their length.

    Example:
        scores = bm25(TokenLists.of_examples(examples), TokenLists.of([tokenizer.encode("Who wrote it?")]))
    """
    _check(documents, queries, k1, b)
    terms, positions = np.unique(np.asarray(queries.ids), return_inverse=True)
    counts = np.zeros((len(terms), len(queries)))  # how often a term is in each query
    np.add.at(counts, (positions, np.repeat(np.arange(len(queries)), np.diff(queries.offsets))), 1.0)
    slots = _slots(terms)

    containing = np.zeros(len(terms), dtype=np.int64)
    for _, _, columns, _ in _occurrences(documents, slots, len(terms)):
        containing += np.bincount(columns, minlength=len(terms))
    weights = np.log1p((len(documents) - containing + 0.5) / (containing + 0.5)) * counts.T  # [queries, terms]

    scores = np.zeros((len(documents), len(queries)), dtype=np.float32)
    lengths = np.diff(documents.offsets)
    penalties = k1 * (1 - b + b * lengths / (lengths.mean() or 1.0))
    for first, rows, columns, occurrences in _occurrences(documents, slots, len(terms)):
        saturated = occurrences * (k1 + 1) / (occurrences + penalties[first + rows])
        last = first + int(rows[-1]) + 1 if len(rows) else first
        for q in range(len(queries)):
            # bincount adds in order. A matrix product would add in an order that depends on the shape of the block.
            scores[first:last, q] = np.bincount(rows, saturated * weights[q][columns], last - first)
    return scores


def bm25_table(
    examples: "Examples", queries: Mapping[str, Sequence[int] | NDArray[Any]], sources: Sequence[IndexedSource]
) -> ScoreTable:
    """Return the BM25 scores of the documents of a training set as a table.

    Args:
        examples: the training set.
        queries: the tokens of each query by its name.
        sources: of the training set, see `indexed_sources`.
    """
    scores = bm25(TokenLists.of_examples(examples), TokenLists.of(list(queries.values())))
    about = {"method": "bm25", "documents": examples.digest, "sources": as_json(sources)}
    documents = tuple(examples.sample_id(i) for i in range(len(examples)))
    return ScoreTable(documents=documents, queries=tuple(queries), scores=scores, about=about)


def _check(documents: TokenLists, queries: TokenLists, k1: float, b: float) -> None:
    if not 0 <= k1 < float("inf"):
        raise ConfigError(f"k1 is {k1}; it must be a number from 0, and 1.2 is usual", field="k1")
    if not 0 <= b <= 1:
        raise ConfigError(f"b is {b}; it must be from 0 to 1, and 0.75 is usual", field="b")
    if not len(documents):
        raise DataError("there is no document to score; give documents")
    empty = np.flatnonzero(np.diff(queries.offsets) == 0)
    if not len(queries) or len(empty):
        which = f"query {int(empty[0]) + 1} has no token" if len(empty) else "there is no query"
        raise DataError(f"{which}, so no document could have a score; give text for each query")


def _slots(terms: NDArray[Any]) -> NDArray[np.int32]:
    """Return a table from token id to its position in `terms`, and −1; its last entry is for all larger ids."""
    slots = np.full(int(terms[-1]) + 2, -1, dtype=np.int32)
    slots[terms] = np.arange(len(terms))
    return slots


def _occurrences(
    documents: TokenLists, slots: NDArray[np.int32], terms: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield for each block: its first document; rows, columns and numbers of the occurring pairs (document, term).

    Rows are counted from the first document. Pairs are in the order of rows, then of columns.
    """
    offsets = np.asarray(documents.offsets)
    first, most = 0, max(1, _CELLS // terms)
    while first < len(documents):
        until = int(np.searchsorted(offsets, offsets[first] + _TOKENS, side="right")) - 1
        until = min(max(until, first + 1), first + most, len(documents))
        ids = np.asarray(documents.ids[offsets[first] : offsets[until]])
        columns = slots[np.minimum(ids, len(slots) - 1)]
        occurring = np.flatnonzero(columns >= 0)
        rows = np.repeat(np.arange(until - first), np.diff(offsets[first : until + 1]))[occurring]
        numbers = np.bincount(rows * terms + columns[occurring], minlength=(until - first) * terms)
        pairs = np.flatnonzero(numbers)
        yield first, pairs // terms, pairs % terms, numbers[pairs]
        first = until
