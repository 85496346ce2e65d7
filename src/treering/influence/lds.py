"""How good influence scores are, measured against retraining: pure functions of scores, subsets and losses.

Legend: Q queries, D training documents, M subsets that a model was retrained on. A score is positive where training on
the document lowers the query's loss. What a scorer predicts of a subset S is Σ_{i∈S} score_i; what retraining shows is
the query's loss. The linear datamodelling score (LDS) is Spearman's ρ over subsets between Σ_{i∈S} score_i and −loss,
averaged over queries: 1 where the scores order all subsets as retraining does, 0 where they know nothing.

    retrained = Retrained(subsets_MD, losses_MQ)
    lds(scores_QD, retrained)                               # 0.689 ± 0.041
    paired_difference(scores_QD, others_QD, retrained)      # +0.012 ± 0.006 on the same subsets and queries
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from treering.core.errors import DataError
from treering.core.seeds import derive

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over queries with its uncertainty.

    Attributes:
        value: the figure itself, from all subsets and queries.
        error: standard deviation of the figure over bootstrap draws.
        low, high: 2.5 % and 97.5 % of the bootstrap draws.
        by_query: the figure of each query, of which `value` is the mean.
    """

    value: float
    error: float
    low: float
    high: float
    by_query: Floats

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


class Retrained:
    """What was retrained on, and what came of it.

    Args:
        subsets_MD: whether the document is in the subset.
        losses_MQ: the query's loss after training on the subset.
    """

    def __init__(self, subsets_MD: ArrayLike, losses_MQ: ArrayLike):
        self.subsets = np.asarray(subsets_MD)
        self.losses = finite("the losses of retraining", "subset", "query", losses_MQ)
        if self.subsets.dtype != np.bool_ or self.subsets.ndim != 2:
            raise DataError(
                f"subsets are a table of true and false, [subsets, documents]; given: {_kind(self.subsets)}"
            )
        if len(self.subsets) != len(self.losses) or len(self.subsets) < 3:
            raise DataError(
                f"{len(self.subsets)} subsets and losses of {len(self.losses)}: one row of losses for each subset, "
                "and at least three subsets"
            )
        constant = np.flatnonzero(np.ptp(self.losses, axis=0) == 0)
        if len(constant):
            raise DataError(
                f"the loss of query {constant[0]} is the same after every retraining, so nothing can be ordered by it: "
                "leave the query out, or train for longer"
            )

    def predicted(self, scores_QD: ArrayLike) -> Floats:
        """Return Σ_{i∈S} score_i, [queries, subsets]."""
        scores = finite("scores", "query", "document", scores_QD)
        wanted = (self.losses.shape[1], self.subsets.shape[1])
        if scores.shape != wanted:
            raise DataError(
                f"scores are [queries, documents], here {list(wanted)} as retrained; given: {list(scores.shape)}"
            )
        return scores @ self.subsets.T.astype(np.float64)


def ranks(values: ArrayLike) -> Floats:
    """Return ranks from 1 along the last axis; equal values share the mean of their ranks.

    Example:
        >>> ranks([10, 30, 30, 20])
        array([1. , 3.5, 3.5, 2. ])
    """
    x = np.asarray(values)
    order = np.argsort(x, axis=-1, kind="stable")
    by_size = np.take_along_axis(x, order, -1)
    begins = np.ones(x.shape, dtype=bool)
    begins[..., 1:] = by_size[..., 1:] != by_size[..., :-1]
    position = np.broadcast_to(np.arange(x.shape[-1]), x.shape)
    first = np.maximum.accumulate(np.where(begins, position, 0), axis=-1)
    ends = np.ones(x.shape, dtype=bool)
    ends[..., :-1] = begins[..., 1:]
    after = np.where(ends, position, x.shape[-1])[..., ::-1]
    last = np.minimum.accumulate(after, axis=-1)[..., ::-1]
    found = np.empty(x.shape)
    np.put_along_axis(found, order, (first + last) / 2 + 1, -1)
    return found


def spearman(x: ArrayLike, y: ArrayLike) -> Floats:
    """Return Spearman's ρ along the last axis: Pearson's correlation of ranks, ties sharing their mean rank.

    It is 0 where one side is constant: who orders nothing agrees with nothing, and disagrees with nothing.
    """
    a, b = (r - r.mean(-1, keepdims=True) for r in (ranks(x), ranks(y)))
    both = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), both, out=np.zeros_like(both), where=both > 0)


def lds(scores_QD: ArrayLike, retrained: Retrained, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Return the linear datamodelling score: the mean over queries of ρ(Σ_{i∈S} score_i, −loss) over subsets.

    Its noise is a bootstrap over subsets and queries. Scorers share most of that noise: compare two of them with
    `paired_difference`, not by their errors.
    """
    x_QM, y_QM = retrained.predicted(scores_QD), -retrained.losses.T
    drawn = [spearman(x_QM[place], y_QM[place]).mean() for place in _resampled(retrained, draws, seed)]
    return _estimate(spearman(x_QM, y_QM), drawn)


def paired_difference(
    scores_QD: ArrayLike, others_QD: ArrayLike, retrained: Retrained, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """Return the LDS of `scores` minus that of `others`, with noise from draws that both share.

    `low` > 0 says that `scores` are better beyond the choice of subsets and queries.
    """
    a_QM, b_QM = retrained.predicted(scores_QD), retrained.predicted(others_QD)
    y_QM = -retrained.losses.T
    drawn = [
        (spearman(a_QM[place], y_QM[place]) - spearman(b_QM[place], y_QM[place])).mean()
        for place in _resampled(retrained, draws, seed)
    ]
    return _estimate(spearman(a_QM, y_QM) - spearman(b_QM, y_QM), drawn)


def chance(scores_QD: ArrayLike, retrained: Retrained, *, draws: int = 1000, seed: int = 0) -> float:
    """Return the standard deviation of the LDS where subsets and losses have nothing to do with one another.

    All queries see the same permutation of the subsets, as they share the retrained models: the noise of an LDS near
    0 is larger than 1/√(MQ).
    """
    x_QM, y_QM = ranks(retrained.predicted(scores_QD)), ranks(-retrained.losses.T)
    random = np.random.default_rng(derive(seed, "lds", "chance"))
    return float(np.std([spearman(x_QM, y_QM[:, random.permutation(y_QM.shape[1])]).mean() for _ in range(draws)]))


def steadiness(scores_QD: ArrayLike, retrained: Retrained, subsets: int, *, draws: int = 100, seed: int = 0) -> float:
    """Return the standard deviation of the LDS over choices of `subsets` among those that were retrained on.

    It says how many retrainings are enough; near the number that there are it goes to 0, and means nothing.
    """
    total = len(retrained.subsets)
    if not 3 <= subsets <= total:
        raise DataError(f"{subsets} of {total} subsets: choose between 3 and {total}")
    x_QM, y_QM = retrained.predicted(scores_QD), -retrained.losses.T
    random = np.random.default_rng(derive(seed, "lds", "steadiness"))
    chosen = [random.choice(total, subsets, replace=False) for _ in range(draws)]
    return float(np.std([spearman(x_QM[:, one], y_QM[:, one]).mean() for one in chosen]))


def leave_top_k_out(
    all_Q: ArrayLike, without_top_Q: ArrayLike, without_random_RQ: ArrayLike, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """Return by how much the loss of a query rises without its top documents, above the rise without random ones.

    (loss without the query's top k − loss) − mean over R draws of (loss without k random documents − loss), averaged
    over queries: 0 by chance, larger is better, in the unit of the losses. Noise: bootstrap over queries.

    Args:
        all_Q: losses after training on every document.
        without_top_Q: losses after training without the k highest scored documents of that very query.
        without_random_RQ: losses after training without k random documents, R times.
    """
    full = finite("losses", "query", "", all_Q)
    top = finite("losses without the top documents", "query", "", without_top_Q)
    random = finite("losses without random documents", "draw", "query", without_random_RQ)
    if full.shape != top.shape or random.shape[1:] != full.shape or not len(random):
        raise DataError(
            f"losses of {list(full.shape)}, {list(top.shape)} without the top and {list(random.shape)} without random "
            "documents: one a query, and of the random ones at least one draw"
        )
    by_query = (top - full) - (random - full).mean(0)
    generator = np.random.default_rng(derive(seed, "lds", "queries"))
    return _estimate(by_query, [by_query[generator.integers(len(full), size=len(full))].mean() for _ in range(draws)])


def top(scores_QD: ArrayLike, k: int) -> NDArray[np.int64]:
    """Return the k highest scored documents of each query, best first; of equal scores the earlier document."""
    scores = finite("scores", "query", "document", scores_QD)
    if not 1 <= k <= scores.shape[1]:
        raise DataError(f"the top {k} of {scores.shape[1]} documents: choose between 1 and {scores.shape[1]}")
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def precision_at(scores_QD: ArrayLike, planted_QD: ArrayLike, k: int) -> Floats:
    """Return for each query the share of planted documents among its top k.

    Where documents at the cut have equal scores, the mean over all orders of these is taken, so that a scorer that
    says nothing gets what chance gets.

    Example:
        >>> precision_at([[3.0, 2.0, 1.0]], [[True, False, True]], k=2)
        array([0.5])
    """
    return _found(scores_QD, planted_QD, k)[0] / k


def recall_at(scores_QD: ArrayLike, planted_QD: ArrayLike, k: int) -> Floats:
    """Return for each query the share of its planted documents that its top k contain; ties as in `precision_at`."""
    found, planted = _found(scores_QD, planted_QD, k)
    without = np.flatnonzero(planted == 0)
    if len(without):
        raise DataError(f"nothing is planted for query {without[0]}, so nothing can be recalled: leave it out")
    return found / planted


def finite(what: str, row: str, column: str, values: Any) -> Floats:
    """Return `values` as a float64 table, or refuse one that is not finite by its row and column."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != (2 if column else 1):
        raise DataError(
            f"{what} have one axis for each {row}{f' and {column}' if column else ''}; given: {_kind(table)}"
        )
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        place = ", ".join(f"{name} {number}" for name, number in zip((row, column), wrong[0]))
        raise DataError(f"{what} are not finite in {len(wrong)} places, the first at {place}: {table[tuple(wrong[0])]}")
    return table


def _found(scores_QD: ArrayLike, planted_QD: ArrayLike, k: int) -> tuple[Floats, Floats]:
    """Return how many planted documents the top k contain, and how many there are, by query."""
    scores = finite("scores", "query", "document", scores_QD)
    planted = np.broadcast_to(np.asarray(planted_QD, dtype=bool), scores.shape)
    last = np.take_along_axis(scores, top(scores, k)[:, -1:], 1)
    above, level = scores > last, scores == last
    share = (k - above.sum(1)) / level.sum(1)
    return (above & planted).sum(1) + share * (level & planted).sum(1), planted.sum(1).astype(np.float64)


def _resampled(retrained: Retrained, draws: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yield indices into a [Q, M] table: queries and subsets drawn with replacement."""
    random = np.random.default_rng(derive(seed, "lds", "bootstrap"))
    subsets, queries = retrained.losses.shape
    for _ in range(draws):
        yield np.ix_(random.integers(queries, size=queries), random.integers(subsets, size=subsets))


def _estimate(by_query: Floats, drawn: list[Any]) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    error = float(np.std(drawn))
    return Estimate(value=float(by_query.mean()), error=error, low=float(low), high=float(high), by_query=by_query)


def _kind(array: NDArray[Any]) -> str:
    return f"{list(array.shape)} of {array.dtype}"
