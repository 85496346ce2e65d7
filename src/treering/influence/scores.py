"""A table of influence scores as a value: documents × queries, also by module, and with those of other methods.

    score(q, n) = Σ_modules ⟨G_q, H⁻¹ G_n⟩

Positive: training on document n lowers the loss of query q (helpful). Negative: it raises it (harmful). Scores of one
table can be compared; those of two methods have other units, so only their ranks can.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import DataError
from treering.influence.records import record_of

Scores = NDArray[np.float32]
Reduction = Literal["mean", "sum", "max"]
_NAMED = 3  # entries that a refusal names


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The score of each token of each document. A document may have none.

    Attributes:
        offsets: [documents + 1]; the tokens of document n are rows offsets[n] to offsets[n + 1].
        scores: [tokens, queries], float32.
    """

    offsets: NDArray[np.int64]
    scores: Scores

    def of(self, document: int) -> Scores:
        """Return the scores [tokens, queries] of a document's tokens."""
        return self.scores[self.offsets[document] : self.offsets[document + 1]]


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores of documents for queries. Ids and names occur once, and all scores are finite; else DataError.

    Attributes:
        documents: ids of the training documents (`train.jsonl:17`, `book.txt:1#3`), or of records, see `by_record`.
        queries: a name for each query.
        scores: [documents, queries], float32; positive is helpful.
        modules: scores of the same shape by module. They add up to `scores`.
        baselines: scores of the same shape of other methods, such as "bm25".
        tokens: scores of single tokens.
        about: what made the scores, as values of JSON: method, digests, `sources` of the ids.
    """

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    scores: Scores
    modules: Mapping[str, Scores] = field(default_factory=dict)
    baselines: Mapping[str, Scores] = field(default_factory=dict)
    tokens: TokenScores | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names in (("document", self.documents), ("query", self.queries)):
            if not names:
                raise DataError(f"the table of scores has no {what}")
            if len(set(names)) < len(names):
                twice = [name for name, times in Counter(names).items() if times > 1]
                raise DataError(f"the {what} {_listed(twice)} is in the table of scores more than once")
        for name, values in self.parts().items():
            self._check(name, values)
        if self.tokens is not None:
            ends = np.asarray(self.tokens.offsets)
            counted = len(ends) == len(self.documents) + 1 and int(ends[0]) == 0 and (np.diff(ends) >= 0).all()
            if not counted or self.tokens.scores.shape != (int(ends[-1]), len(self.queries)):
                raise DataError("the scores of tokens are not those of this table's documents and queries")
            if not np.isfinite(self.tokens.scores).all():
                row = int(np.flatnonzero(~np.isfinite(self.tokens.scores).all(axis=1))[0])
                document = self.documents[int(np.searchsorted(ends, row, side="right")) - 1]
                raise DataError(f"a token of {document} has a score that is not finite; {_REMEDY}")
        for name in ("modules", "baselines", "about"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def parts(self) -> dict[str, Scores]:
        """Return all arrays [documents, queries] by name: `score`, `module:NAME`, `baseline:NAME`."""
        named = {f"module:{name}": values for name, values in self.modules.items()}
        named |= {f"baseline:{name}": values for name, values in self.baselines.items()}
        return {"score": self.scores, **named}

    def _check(self, name: str, values: Scores) -> None:
        shape = (len(self.documents), len(self.queries))
        if values.dtype != np.float32 or values.shape != shape:
            raise DataError(
                f"{name} is {values.dtype} of shape {values.shape}; it must be float32 [documents, queries] {shape}"
            )
        finite = np.isfinite(values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            wrong = [self.documents[i] for i in np.flatnonzero(~finite.all(axis=1))[: _NAMED + 1]]
            raise DataError(
                f"{name} of {_listed(wrong)} is not finite (query {self.queries[column]}: {values[row, column]}); "
                f"{_REMEDY}"
            )

    def query(self, name: str) -> int:
        """Return the column of a query."""
        if name not in self.queries:
            raise DataError(f"there is no query {name!r} in the table of scores; it has {_listed(self.queries)}")
        return self.queries.index(name)

    def order(self, query: str, *, first: Literal["helpful", "harmful"] = "helpful") -> NDArray[np.int64]:
        """Return the rows from the most helpful (or harmful) to the least. Equal scores stay in the table's order."""
        column = self.scores[:, self.query(query)]
        return np.argsort(-column if first == "helpful" else column, kind="stable")

    def reduced(self, how: Reduction, queries: Sequence[str] | None = None, *, name: str | None = None) -> "ScoreTable":
        """Return a table with one query: for each document, the mean, sum or maximum over queries.

        Args:
            how: sums are made in fp64.
            queries: which; None: all.
            name: of the query of the result, by default `mean of 8 queries`.
        """
        columns = [self.query(query) for query in (self.queries if queries is None else queries)]
        if not columns:
            raise DataError("there is no query to reduce over; name at least one")

        def over(values: Scores) -> Scores:
            wide = values[:, columns].astype(np.float64)
            if how == "max":
                return wide.max(axis=1, keepdims=True).astype(np.float32)
            reduced = wide.mean(axis=1, keepdims=True) if how == "mean" else wide.sum(axis=1, keepdims=True)
            return reduced.astype(np.float32)

        additive = how != "max"  # a maximum over queries is not the sum of the maxima of modules
        return replace(
            self,
            queries=(name or f"{how} of {len(columns)} queries",),
            scores=over(self.scores),
            modules={key: over(values) for key, values in self.modules.items()} if additive else {},
            baselines={key: over(values) for key, values in self.baselines.items()},
            tokens=replace(self.tokens, scores=over(self.tokens.scores)) if self.tokens and additive else None,
        )

    def by_record(self) -> "ScoreTable":
        """Return the table of records: a record's score is the sum over its pieces, as all are removed with it.

        Records are in the order of their first piece. Scores of tokens stay with documents.
        """
        ids: dict[str, int] = {}
        rows = np.array([ids.setdefault(record_of(document), len(ids)) for document in self.documents], dtype=np.int64)
        if len(ids) == len(rows) and tuple(ids) == self.documents:  # no document is a piece
            return replace(self, tokens=None)

        def summed(values: Scores) -> Scores:
            sums = [np.bincount(rows, column, len(ids)) for column in values.T]  # in fp64, in the order of pieces
            return np.column_stack(sums).astype(np.float32)

        return replace(
            self,
            documents=tuple(ids),
            scores=summed(self.scores),
            modules={key: summed(values) for key, values in self.modules.items()},
            baselines={key: summed(values) for key, values in self.baselines.items()},
            tokens=None,
        )

    def with_baseline(self, name: str, other: "ScoreTable") -> "ScoreTable":
        """Return this table with the scores of another method for the same queries next to its own.

        The other table may have more documents and queries, and in another order.
        """
        places = {document: row for row, document in enumerate(other.documents)}
        missing = [document for document in self.documents if document not in places]
        if missing:
            raise DataError(
                f"{name} has no score of {_listed(missing)}; score the same documents by both, or sum both by record"
            )
        rows = [places[document] for document in self.documents]
        columns = [other.query(query) for query in self.queries]
        return replace(self, baselines={**self.baselines, name: other.scores[np.ix_(rows, columns)]})

    def with_tokens(self, scores: Mapping[int, Scores]) -> "ScoreTable":
        """Return this table with the scores [tokens, queries] of the tokens of some rows; other rows have none."""
        lengths = np.zeros(len(self.documents), dtype=np.int64)
        for row, values in scores.items():
            lengths[row] = len(values)
        none = np.zeros((0, len(self.queries)), dtype=np.float32)
        flat = np.concatenate([none, *(scores[row] for row in sorted(scores))])
        return replace(self, tokens=TokenScores(offsets=np.concatenate([[0], np.cumsum(lengths)]), scores=flat))


_REMEDY = "index the documents again; if it stays, look at that one with `treering data show`"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_NAMED]))
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
