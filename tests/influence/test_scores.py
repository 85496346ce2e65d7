"""Tables of scores: order, reductions, records, other methods; files; what is refused."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from tests.influence.tables import full, same, table
from treering.core.errors import DataError
from treering.influence.scores import ScoreTable, TokenScores
from treering.influence.tables import read_scores, write_scores


def test_the_most_helpful_come_first_and_equal_scores_keep_their_order():
    scores = table(["a:1", "a:2", "a:3", "a:4", "a:5"], [0.0, 2.0, -1.0, 2.0, 0.0])
    assert scores.order("q0").tolist() == [1, 3, 0, 4, 2]
    assert scores.order("q0", first="harmful").tolist() == [2, 0, 4, 1, 3]


def test_reductions_over_queries():
    scores = table(["a:1", "a:2"], [[1.0, 3.0, -1.0], [0.0, 0.5, 4.0]])
    assert scores.reduced("mean").scores.tolist() == [[1.0], [1.5]]
    assert scores.reduced("mean").queries == ("mean of 3 queries",)
    assert scores.reduced("sum", ["q0", "q1"], name="both").scores.tolist() == [[4.0], [0.5]]
    assert scores.reduced("max").scores.tolist() == [[3.0], [4.0]]


def test_modules_and_tokens_still_add_up_after_a_mean_and_are_left_out_of_a_maximum():
    reduced = full().reduced("mean")
    np.testing.assert_allclose(sum(reduced.modules.values()), reduced.scores, atol=1e-6)
    assert reduced.tokens is not None and reduced.tokens.scores.shape[1] == 1 and "bm25" in reduced.baselines
    most = full().reduced("max")
    assert not most.modules and most.tokens is None and "bm25" in most.baselines


def test_a_sum_does_not_lose_small_scores_next_to_a_large_one():
    scores = table(["a:1"], [[1e8, 1.0, -1e8]])
    assert scores.reduced("sum").scores[0, 0] == 1.0


def test_pieces_are_summed_to_their_record_in_the_order_of_first_pieces():
    pieces = table(["b:2", "a:1", "a:1#1", "b:1", "a:1#2", "b:2#1"], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    records = pieces.by_record()
    assert records.documents == ("b:2", "a:1", "b:1") and records.scores[:, 0].tolist() == [33.0, 22.0, 8.0]
    same(records, records.by_record())


def test_modules_and_baselines_are_summed_with_their_records():
    scores = full()
    pieces = ScoreTable(
        documents=tuple(f"a:{1 + i // 3}" + (f"#{i % 3}" if i % 3 else "") for i in range(7)),
        queries=scores.queries,
        scores=scores.scores,
        modules=scores.modules,
        baselines=scores.baselines,
        tokens=scores.tokens,
    )
    records = pieces.by_record()
    assert len(records.documents) == 3 and records.tokens is None
    np.testing.assert_array_equal(sum(records.modules.values()), records.scores)
    np.testing.assert_allclose(records.baselines["bm25"][0], scores.baselines["bm25"][:3].sum(0), rtol=1e-6)


def test_another_method_is_put_next_to_it_whatever_its_order():
    ours = table(["a:1", "a:2"], [[1, 2], [3, 4]], ("one", "two"))
    other = table(["a:2", "a:3", "a:1"], [[1, 2, 3], [4, 5, 6], [7, 8, 9]], ("two", "three", "one"))
    assert ours.with_baseline("bm25", other).baselines["bm25"].tolist() == [[9, 7], [3, 1]]
    with pytest.raises(DataError, match="bm25 has no score of 'a:3'"):
        table(["a:3", "a:4"], [0, 0]).with_baseline("bm25", table(["a:4"], [1]))
    with pytest.raises(DataError, match="no query 'q1'"):
        table(["a:3"], [[0, 0]]).with_baseline("bm25", table(["a:3"], [1]))


@pytest.mark.parametrize("name", ["scores.parquet", "scores.arrow"])
def test_a_file_has_every_bit_of_the_table(tmp_path, name):
    for kept in (full(), table(["a:1"], [0.5]), full(1, 1), full(300, 2)):
        (tmp_path / name).unlink(missing_ok=True)
        write_scores(kept, tmp_path / name)
        same(kept, read_scores(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_same_table_gives_the_same_bytes(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_scores(full(), tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_other_programs_can_read_the_columns(tmp_path):
    write_scores(table(["a:1", "a:2"], [[1, 2], [3, 4]]), tmp_path / "s.parquet")
    assert parquet.read_table(tmp_path / "s.parquet").to_pydict() == {
        "document": ["a:1", "a:2"], "score:q0": [1, 3], "score:q1": [2, 4],
    }  # fmt: skip


def test_no_file_is_overwritten_and_other_endings_are_refused(tmp_path):
    write_scores(full(), tmp_path / "s.parquet")
    with pytest.raises(DataError, match="exists already"):
        write_scores(full(), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"\.parquet or \.arrow"):
        write_scores(full(), tmp_path / "s.csv")
    with pytest.raises(DataError, match="cannot be written"):
        write_scores(full(), tmp_path / "s.parquet" / "s.parquet")


@pytest.mark.parametrize("name", ["s.parquet", "s.arrow"])
def test_what_is_no_table_of_scores_is_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(DataError, match="no such"):
        read_scores(path)
    write_scores(full(), path)
    written = path.read_bytes()
    for damaged in (b"", written[: len(written) // 2], b"PAR1" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no table of scores, or a damaged one"):
            read_scores(path)


def test_a_foreign_table_and_a_later_format_are_refused(tmp_path):
    path = tmp_path / "s.parquet"
    parquet.write_table(pyarrow.table({"document": ["a:1"], "score:q": [1.0]}), path)
    with pytest.raises(DataError, match="no table of scores"):
        read_scores(path)
    later = pyarrow.table({"document": ["a:1"]}).replace_schema_metadata({"treering": json.dumps({"format": 2})})
    parquet.write_table(later, path)
    with pytest.raises(DataError, match="of format 2"):
        read_scores(path)


def test_ids_and_names_that_are_twice_are_named():
    with pytest.raises(DataError, match="document 'a:2' is in the table of scores more than once"):
        table(["a:1", "a:2", "a:2"], [0, 1, 2])
    with pytest.raises(DataError, match="query 'same' is"):
        table(["a:1"], [[0, 1]], ("same", "same"))


def test_scores_that_are_not_finite_are_named():
    values = np.zeros((6, 2), dtype=np.float32)
    values[1, 1], values[3:, 0] = np.nan, np.inf
    with pytest.raises(DataError, match=r"score of 'a:1', 'a:3', 'a:4' and 1 more is not finite \(query q1: nan"):
        table([f"a:{i}" for i in range(6)], values)
    with pytest.raises(DataError, match="module:up of 'a:0'"):
        table(["a:0"], [0.0], modules={"up": np.full((1, 1), np.nan, np.float32)})
    tokens = TokenScores(offsets=np.array([0, 2, 2, 3]), scores=np.array([[0.0], [1.0], [np.nan]], np.float32))
    with pytest.raises(DataError, match="a token of a:3"):
        table(["a:1", "a:2", "a:3"], [0, 0, 0], tokens=tokens)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="float64"):
        ScoreTable(documents=("a:1",), queries=("q",), scores=np.zeros((1, 1)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="module:up is float32 of shape"):
        table(["a:1"], [0.0], modules={"up": np.zeros((1, 2), np.float32)})
    for offsets, tokens in (([0, 1], 2), ([0, 2, 3], 3), ([1, 2], 2)):
        with pytest.raises(DataError, match="scores of tokens"):
            table(["a:1"], [0.0], tokens=TokenScores(offsets=np.array(offsets), scores=np.zeros((tokens, 1), "f4")))
    for documents, queries in (((), ("q",)), (("a:1",), ())):
        with pytest.raises(DataError, match="has no"):
            ScoreTable(documents=documents, queries=queries, scores=np.zeros((len(documents), len(queries)), "f4"))
    with pytest.raises(DataError, match="no query to reduce"):
        full().reduced("mean", [])
