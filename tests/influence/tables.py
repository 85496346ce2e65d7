"""Small tables of scores."""

from typing import Any

import numpy as np

from treering.influence.scores import ScoreTable, TokenScores


def table(documents: list[str], scores: Any, queries: tuple[str, ...] = (), **more: Any) -> ScoreTable:
    """A table from rows of numbers; a plain number is a row of one."""
    values = np.array(scores, dtype=np.float32).reshape(len(documents), -1)
    names = queries or tuple(f"q{i}" for i in range(values.shape[1]))
    return ScoreTable(documents=tuple(documents), queries=names, scores=values, **more)


def full(documents: int = 7, queries: int = 3, seed: int = 0) -> ScoreTable:
    """A table that has everything that a table may have; modules add up to the scores."""
    random = np.random.default_rng(seed)
    parts = {f"layers.{i}.up_proj": random.integers(-9, 9, (documents, queries)) / np.float32(4) for i in range(2)}
    modules = {name: values.astype(np.float32) for name, values in parts.items()}
    offsets = np.cumsum([0, *random.integers(0, 5, documents)])
    tokens = random.normal(size=(offsets[-1], queries)).astype(np.float32)
    return ScoreTable(
        documents=tuple(f"a.jsonl:{i + 1}" for i in range(documents)),
        queries=tuple(f"[red]query {i}" for i in range(queries)),
        scores=sum(modules.values()),  # type: ignore[arg-type]
        modules=modules,
        baselines={"bm25": random.random((documents, queries), dtype=np.float32)},
        tokens=TokenScores(offsets=offsets, scores=tokens),
        about={"method": "psift", "sources": []},
    )


def same(one: ScoreTable, other: ScoreTable) -> None:
    """Assert that two tables are equal to the bit."""
    assert (one.documents, one.queries, dict(one.about)) == (other.documents, other.queries, dict(other.about))
    assert one.parts().keys() == other.parts().keys()
    for name, values in one.parts().items():
        assert np.array_equal(values, other.parts()[name]) and values.dtype == other.parts()[name].dtype, name
    assert (one.tokens is None) == (other.tokens is None)
    if one.tokens is not None and other.tokens is not None:
        assert np.array_equal(one.tokens.offsets, other.tokens.offsets)
        assert np.array_equal(one.tokens.scores, other.tokens.scores)
