"""Which records leave a dataset: the most harmful ones, the most helpful ones, or all but the most helpful."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import ConfigError, DataError
from treering.influence.scores import ScoreTable


@dataclass(frozen=True, kw_only=True)
class RecordChoice:
    """Which records are removed. Exactly one of `count`, `share` and `score` is given.

    Attributes:
        action: whether `count`, `share` and `score` say what is removed, or what is kept.
        side: "harmful" records leave, those with the lowest scores. "helpful" ones leave where the query is an answer
            that the model is not to give: they taught it.
        count: this many are removed, or kept.
        share: this share of the records with a score, above 0 and below 1, rounded down to a number of records.
        score: those on that side of it are removed, or those on the other side are kept.
        unscored: what happens to records without a score: those that were held out, skipped, or not indexed.
    """

    action: Literal["remove", "keep"] = "remove"
    side: Literal["harmful", "helpful"] = "harmful"
    count: int | None = None
    share: float | None = None
    score: float | None = None
    unscored: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        given = [name for name in ("count", "share", "score") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'none of count, share and score'} given; "
                f"give one of them to decide how many records to {self.action}",
                field="count",
            )
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1", field="count")
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(f"share is {self.share}; it must be above 0 and below 1", field="share")
        if self.score is not None and not np.isfinite(self.score):
            raise ConfigError(f"score is {self.score}; it must be a finite number", field="score")

    @property
    def low(self) -> bool:
        """Whether `count`, `share` and `score` are about the records with the lowest scores."""
        return (self.action == "remove") == (self.side == "harmful")

    @property
    def text(self) -> str:
        """The choice in words."""
        if self.score is not None:
            return f"{self.action} those with a score {'below' if self.low else 'above'} {self.score:g}"
        amount = f"{self.count}" if self.count is not None else f"{100 * (self.share or 0.0):g} %"
        return f"{self.action} the {amount} most {'harmful' if self.low else 'helpful'}"


@dataclass(frozen=True, kw_only=True)
class ChosenRecords:
    """The rows of a table of records that are removed, from the first to be removed on.

    Attributes:
        rows: rows of the table.
        ties: records that are kept, with exactly the score of one that is removed.
    """

    rows: NDArray[np.int64]
    ties: int


def choose(table: ScoreTable, choice: RecordChoice) -> ChosenRecords:
    """Return the records of a table with one query that are removed. Of equal scores, the table's order decides.

    DataError if that would be no record, or all of them.
    """
    if len(table.queries) != 1:
        raise DataError(
            f"the table has {len(table.queries)} queries; name one, or reduce them to one by mean, sum or max"
        )
    records, scores = len(table.documents), table.scores[:, 0]
    order = table.order(table.queries[0], first="harmful" if choice.low else "helpful")
    if choice.score is not None:
        number = int((scores < choice.score).sum() if choice.low else (scores > choice.score).sum())
    else:
        number = choice.count if choice.count is not None else int((choice.share or 0.0) * records + 1e-9)
    number = min(number, records)
    rows = order[:number] if choice.action == "remove" else order[number:][::-1]
    if len(rows) in (0, records):
        low, high = float(scores.min()), float(scores.max())
        raise DataError(
            f"to {choice.text} would remove {'nothing' if not len(rows) else 'everything'}: {records:,} records have "
            f"scores from {low:.4g} to {high:.4g}; give another number"
        )
    kept = np.delete(scores, rows)
    return ChosenRecords(rows=rows, ties=int(np.isin(kept, scores[rows]).sum()))
