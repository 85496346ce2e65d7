"""Is an index right? What it says of a run, against training the run again without some of its records.

LDS                    Spearman's ρ over random halves of the records, see `lds.py`
leave the top k out    rise of a query's loss without its k most helpful records, above that without k random ones
recall                 share of planted records among the first, as many as there are
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import ConfigError, DataError
from treering.core.seeds import derive
from treering.data.document import Document
from treering.influence.lds import (
    Estimate,
    Retrained,
    chance,
    lds,
    leave_top_k_out,
    paired_difference,
    recall_at,
    top,
)
from treering.influence.retraining import Retraining, seconds_of
from treering.influence.run_index import AskedIndex
from treering.technique import Technique

INDEX, WORDS = "index", "bm25"
Progress = Callable[[int, int, float | None], None]  # (trainings done, of, seconds of one if known)


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """How much is retrained.

    Attributes:
        subsets: trainings on a random half of the records each. Subset i is the same whatever this number is.
        leave_out: records that are left out of a query's training, the most helpful ones; 0: that is not done.
        draws: trainings without as many random records, to compare these with.
        seed: of the halves and of the random records.
    """

    subsets: int = 20
    leave_out: int = 5
    draws: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("subsets", 3), ("leave_out", 0), ("draws", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is at least {least}", field=name)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What retraining says of an index and of other scorers, by the name of the scorer.

    Attributes:
        trainings: how many there were, those that had been done before included.
        scores: the LDS of each scorer.
        differences: the LDS of the index minus that of each other scorer.
        chance: standard deviation of the LDS of a scorer that knows nothing.
        without_top: by how much the loss of a query rises without the records that the index names, above the rise
            without random ones, in nats a token; None: not asked for.
        recall: of planted records; empty: there are none.
    """

    trainings: int
    scores: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    chance: float
    without_top: Estimate | None = None
    recall: Mapping[str, float] = field(default_factory=dict)

    @property
    def warning(self) -> str | None:
        """The warning for the user if the index is not better than BM25, or None."""
        difference = self.differences[WORDS]
        if difference.low > 0:
            return None
        return (
            f"the index is not shown to be better than BM25, which counts words: its LDS is {difference.value:+.3f} "
            f"above, and 95 % of the draws lie between {difference.low:+.3f} and {difference.high:+.3f}. More "
            "--subsets narrow this; an index with more numbers a document may be better"
        )


def validate(
    asked: AskedIndex, queries: Mapping[str, Document], to: Path, settings: ValidationSettings | None = None, *,
    others: Mapping[str, AskedIndex] | None = None, planted: Collection[str] = (), helping: Sequence[Technique] = (),
    progress: Progress = lambda done, of, seconds: None,
) -> Validation:  # fmt: skip
    """Train a run again without some of its records, and compare with what its index says.

    Args:
        asked: the index.
        queries: documents by name.
        to: the folder of the losses. The same call resumes what was interrupted, and more subsets add to those there.
        others: more indexes of the same run, by name, to compare with.
        planted: ids of the records that an index should find for each query.
        helping: techniques that make a forward fit.
        progress: called before the first training and after each.

    Example:
        found = validate(of_run.open_index(), queries, Path("validation"))
        print(found.scores["index"], found.differences["bm25"].low)
    """
    settings = settings or ValidationSettings()
    retraining = Retraining(of_run=asked.of_run, queries=queries, folder=to, helping=helping)
    records = retraining.records
    _check(settings, records, planted)
    scores = _scores(asked, others or {}, queries, records)
    halves = half_subsets(len(records), settings.subsets, settings.seed)
    first = top(scores[INDEX], settings.leave_out) if settings.leave_out else np.zeros((0, 0), dtype=np.int64)
    wanted = [[records[i] for i in np.flatnonzero(~half)] for half in halves]
    if settings.leave_out:
        random = _random(len(records), settings)
        wanted += [[], *([records[i] for i in rows] for rows in (*first.tolist(), *random))]
    retraining.open()
    losses, trainings = _retrain(retraining, wanted, progress)
    retrained = Retrained(halves, losses[: len(halves)])
    without_top = None
    if settings.leave_out:
        full, rest = losses[len(halves)], losses[len(halves) + 1 :]
        without_top = leave_top_k_out(full, np.diagonal(rest[: len(queries)]), rest[len(queries) :], seed=settings.seed)
    is_planted = np.isin(records, sorted(planted))[None]
    return Validation(
        trainings=trainings,
        scores={name: lds(each, retrained, seed=settings.seed) for name, each in scores.items()},
        differences={
            name: paired_difference(scores[INDEX], each, retrained, seed=settings.seed)
            for name, each in scores.items()
            if name != INDEX
        },
        chance=chance(scores[INDEX], retrained, seed=settings.seed),
        without_top=without_top,
        recall={n: float(recall_at(x, is_planted, len(planted)).mean()) for n, x in scores.items()} if planted else {},
    )


def half_subsets(records: int, subsets: int, seed: int) -> NDArray[np.bool_]:
    """Return whether a record is in a subset, [subsets, records]: a random half each."""
    generators = [np.random.default_rng(derive(seed, "validate", "half", i)) for i in range(subsets)]
    return np.stack([generator.permutation(records) < records // 2 for generator in generators])


def _random(records: int, settings: ValidationSettings) -> list[list[int]]:
    generators = [np.random.default_rng(derive(settings.seed, "validate", "random", i)) for i in range(settings.draws)]
    return [generator.permutation(records)[: settings.leave_out].tolist() for generator in generators]


def _check(settings: ValidationSettings, records: Sequence[str], planted: Collection[str]) -> None:
    if len(records) < 4:
        raise DataError(f"the training data has {len(records)} records; halves of them need at least 4")
    if settings.leave_out > len(records) // 2:
        raise ConfigError(
            f"leave_out is {settings.leave_out} of {len(records)} records; leave out at most half of them",
            field="leave_out",
        )
    if unknown := sorted(set(planted) - set(records)):
        raise DataError(
            f"{unknown[0]!r} is planted, and not a record of the training data; ids are like {records[0]!r}"
        )


def _scores(
    asked: AskedIndex, others: Mapping[str, AskedIndex], queries: Mapping[str, Document], records: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Return the scores [queries, records] of each scorer."""
    table = asked.scores(queries).by_record()
    tables = {name: other.scores(queries, words=False).by_record() for name, other in others.items()}
    assert all(one.documents == tuple(records) for one in (table, *tables.values()))
    scores = {INDEX: table.scores, WORDS: table.baselines["bm25"], **{name: one.scores for name, one in tables.items()}}
    return {name: values.T.astype(np.float64) for name, values in scores.items()}


def _retrain(
    retraining: Retraining, wanted: Sequence[Sequence[str]], progress: Progress
) -> tuple[NDArray[np.float64], int]:
    """Return the losses [sets of records, queries], and the number of trainings: equal sets are trained on once."""
    different = {tuple(sorted(left_out)) for left_out in wanted}
    done, seconds = sum(map(retraining.known, different)), seconds_of(retraining.of_run.job)
    progress(done, len(different), seconds)
    losses, spent = [], []
    for left_out in wanted:
        new, began = not retraining.known(left_out), time.monotonic()
        losses.append(retraining.losses(left_out))
        if new:
            done += 1
            spent.append(time.monotonic() - began)
            progress(done, len(different), sum(spent) / len(spent))
    return np.stack(losses), len(different)
