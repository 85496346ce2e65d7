"""Scores of an index: those of the rows that it keeps, whatever blocks, shards and modules they are added from."""

from dataclasses import replace

import pytest
import torch

from tests.same import assert_same
from tests.sketches.indexed import KINDS, build, ids, recipe, rows
from tests.sketches.toy import normal
from treering import CheckpointError, ConfigError, DataError, sketches
from treering.sketches import index as index_module
from treering.sketches import reference, scoring, writing
from treering.sketches.best import BestDocuments


def queries(of, count=4, tag="q"):
    return rows(of, 10**6, 10**6 + count, tag)


@pytest.fixture(scope="module", params=KINDS)
def index(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    build(folder, request.param, shards=4, total=18)
    return sketches.open(folder)


def of_kind(tmp_path, kind):
    build(tmp_path / "index", kind)
    return sketches.open(tmp_path / "index")


def test_scores_are_products_with_the_rows_that_are_kept(index):
    q = queries(index.recipe)
    found = index.score(q)
    assert found.documents is None
    assert_same(found.values, reference.scores(index.rows(range(18)), q), 1e-6)


def test_the_best_documents_are_those_with_the_highest_scores(index):
    q = queries(index.recipe)
    whole = index.score(q).values
    for top in (1, 5, 18, 40):
        best = index.score(q, top=top)
        wanted = whole.T.sort(dim=1, descending=True, stable=True)
        assert torch.equal(best.values, wanted.values[:, :top]) and torch.equal(best.documents, wanted.indices[:, :top])


def test_pages_and_blocks_do_not_change_scores(index, monkeypatch):
    q = queries(index.recipe)
    wanted = index.score(q, top=5)
    monkeypatch.setattr(index_module, "PAGE", 3 * 4)
    for name, value in (("BLOCK", 40), ("ROWS", 3), ("ENTRIES", 20)):
        monkeypatch.setattr(scoring, name, value)
    found = index.score(q, top=5)
    assert torch.equal(found.documents, wanted.documents)
    assert_same(found.values, wanted.values, 1e-6)
    assert [start for start, _ in index.score_pages(q)] == [0, 3, 5, 8, 10, 13, 15]
    monkeypatch.setattr(index_module, "PAGE", 11 * 4)
    monkeypatch.setattr(index_module, "OPEN", 2)
    assert [(start, len(x)) for start, x in index.score_pages(q)] == [(0, 10), (10, 8)]
    assert_same(index.score(q, top=5).values, wanted.values, 1e-6)


def test_scores_of_modules_add_up(index):
    q = queries(index.recipe)
    whole = index.score(q).values
    parts = index.by_module(q, [2, 17, 3])
    assert list(parts) == ["a", "b", "c"] and not parts["c"][2].any()
    assert_same(sum(parts.values()), whole[[2, 17, 3]], 1e-6)
    some = index.score(q, modules=["c", "a"]).values
    assert_same(some, index.score(q, modules=["a"]).values + index.score(q, modules=["c"]).values, 1e-6)
    assert_same(some + index.score(q, modules=["b"]).values, whole, 1e-6)
    assert_same(parts["b"], index.score({"b": q["b"]}, modules=["b"]).values[[2, 17, 3]], 1e-6)


def test_scores_are_linear_in_the_query(index):
    one, two = queries(index.recipe), queries(index.recipe, tag="r")
    both = {name: 2 * one[name] - two[name] for name in one}
    assert_same(index.score(both).values, 2 * index.score(one).values - index.score(two).values, 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "exact int4"])
def test_cosines_and_lengths(kind, tmp_path):
    index = of_kind(tmp_path, kind)
    q = queries(index.recipe)
    q["a"][1], q["b"][1], q["c"][1] = 0, 0, 0
    kept = index.rows(range(15))
    assert_same(index.score(q, unit=True).values, reference.scores(kept, q, unit=True), 1e-6)
    assert_same(index.score(q, unit=True, modules=["c"]).values, reference.scores(kept, {"c": q["c"]}, unit=True), 1e-6)
    lengths = torch.cat(list(kept.values()), 1).double().square().sum(1)
    assert_same(index.self_influence(), lengths, 1e-6)
    assert_same(index.self_influence(), index.score(kept).values.diagonal(), 1e-6)
    assert index.self_influence(modules=["c"])[3] == 0
    assert_same(index.score(kept, unit=True).values.diagonal(), torch.ones(15), 1e-6)


def test_small_numbers_have_lengths(tmp_path):
    of = recipe("psift float32")
    with writing(tmp_path / "index", of) as writer, writer.shard(0) as shard:
        shard.add(ids(0, 5), range(5), {name: x * 1e-30 for name, x in rows(of, 0, 5).items()})
    with writing(tmp_path / "index", of) as writer:
        writer.publish(1)
    index = sketches.open(tmp_path / "index")
    assert_same(index.score(index.rows(range(5)), unit=True).values.diagonal(), torch.ones(5), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_documents_have_equal_scores_wherever_they_are(kind, tmp_path):
    of = recipe(kind, {"a": (16, 16), "b": (20, 30)})
    one = rows(of, 5, 6)
    with writing(tmp_path / "index", of) as writer:
        for number, count in enumerate((1, 1500, 37, 2)):
            with writer.shard(number) as shard:
                shard.add(["copy"] * count, [1] * count, {name: x.expand(count, -1) for name, x in one.items()})
        writer.publish(4)
    index = sketches.open(tmp_path / "index")
    for count in (1, 2, 8, 9):
        values = index.score(queries(of, count)).values
        assert_same(values, values[:1].expand_as(values), 0 if "float" not in kind else 1e-7)


def test_sums_in_fixed_point_are_exact():
    x = normal(5, 300).double() * torch.logspace(-30, 30, 5)[:, None]
    whole, steps = scoring.fixed_point(x)
    most = x.abs().amax(1, keepdim=True)
    assert_same(whole * steps[:, None] / most, x / most, 1e-11)
    codes = torch.randint(-127, 128, (300, 300)).double()
    for order in (torch.arange(300), torch.arange(299, -1, -1), torch.randperm(300)):
        assert torch.equal(codes[:, order] @ whole[:, order].T, codes @ whole.T)
    assert float((127 * whole.abs()).sum(1).max()) < 2**53
    assert not scoring.fixed_point(torch.zeros(2, 4))[0].any()


def test_of_equal_scores_the_earlier_document_is_better():
    scores = torch.tensor([[1.0], [3.0], [3.0], [2.0], [3.0], [2.0]])
    for step in (1, 2, 4, 6):
        best = BestDocuments(1, 4)
        for start in range(0, 6, step):
            best.add(start, scores[start : start + step])
        assert best.documents.tolist() == [[1, 2, 4, 3]] and best.values.tolist() == [[3, 3, 3, 2]]


def realistic(of, first, last):
    """Rows with a few large numbers and documents of very different length, as gradients have."""
    made = {}
    shared = {m.name: normal(6, m.numbers, name=f"shared {m.name}") for m in of.modules}
    for module in of.modules:
        mixed = normal(last - first, 6, name=f"mix {module.name} {first}") @ shared[module.name]
        x = mixed + normal(last - first, module.numbers, name=f"own {module.name} {first}")
        made[module.name] = (
            x * normal(last - first, 1, name=f"length {first}").exp() * torch.logspace(0, -2, module.numbers)
        )
    return made


@pytest.mark.parametrize("storage", ["psift", "psift float16", "exact int4"])
def test_scores_from_few_bits_are_those_of_the_numbers(storage, tmp_path):
    """int8: relative error at most 2 %, rank correlation at least 0.999."""
    of = recipe(storage, {"a": (16, 16), "b": (16, 16), "c": (8, 16)})
    given = realistic(of, 0, 400)
    with writing(tmp_path / "index", of) as writer:
        with writer.shard(0) as shard:
            shard.add(ids(0, 400), [1] * 400, given)
        writer.publish(1)
    q = realistic(of, 1000, 1008)
    found, wanted = sketches.open(tmp_path / "index").score(q).values.double(), reference.scores(given, q)
    error = (found - wanted).norm(dim=0) / wanted.norm(dim=0)
    ranks = [x.argsort(0).argsort(0).double() for x in (found, wanted)]
    correlation = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(*(r.T for r in ranks))])
    bounds = {"psift": (0.02, 0.999), "psift float16": (0.001, 0.9999), "exact int4": (0.1, 0.985)}[storage]
    assert error.max() <= bounds[0] and correlation.min() >= bounds[1], (error, correlation)


def test_what_cannot_be_scored_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    build(tmp_path / "index", "psift")
    index = sketches.open(tmp_path / "index")
    monkeypatch.setattr(index_module.ShardReader, "tensor", None)
    q = queries(index.recipe)
    for other, message in (
        ({"model": "m2"}, "the digest of the model m1, not m2; an index serves one model alone"),
        ({"statistics": "s2"}, "the digest of the statistics s1, not s2"),
        ({"basis": "b2"}, "the digest of the basis b1, not b2"),
        ({"about": {"loss": "mean"}}, "has loss nothing, not mean; make the query with the settings"),
        ({"shapes": {"a": (6, 10), "b": (7, 9)}}, "has for c 6 × 10 as 3 × 5, not nothing"),
        ({"shapes": {"a": (6, 10), "b": (7, 8), "c": (3, 5)}}, "has for b 14 × 18 as 7 × 9, not 14 × 16 as 7 × 8"),
        ({"shapes": {"b": (7, 9), "a": (6, 10), "c": (3, 5)}}, "the order of modules"),
        ({"kind": "eigen-topk"}, "has kind psift, not eigen-topk"),
    ):
        with pytest.raises(CheckpointError, match=message):
            index.check(recipe(**other))
    index.check(recipe())
    for seed_or_size in ({"seed": 3}, {"size": 32}):
        changed = type(index.recipe.settings)(kind="psift", curvature="kfac", **seed_or_size)
        other = replace(index.recipe, settings=changed)
        with pytest.raises(CheckpointError, match=f"has {next(iter(seed_or_size))} "):
            index.check(other)
    for bad, error, message in (
        (lambda: index.score(q, modules=["x"]), ConfigError, "x is not in .* which has 3 modules: a, b, c"),
        (lambda: index.score(q, modules=[]), ConfigError, "no module"),
        (lambda: index.score(q, top=0), ConfigError, "top is 0"),
        (lambda: index.score({"a": q["a"]}), DataError, "b has rows of 63 numbers in .* the queries have none"),
        (lambda: index.score(q | {"b": q["b"][:, :7]}), DataError, r"the queries have those of \(4, 7\)"),
        (lambda: index.score(q | {"b": q["b"][:2]}), DataError, r"the queries have those of \(2, 63\)"),
        (lambda: index.score(q | {"c": q["c"] / 0}), DataError, "gradient of query 0 is not finite in c"),
        (lambda: index.rows([15]), DataError, "document 15 was asked for"),
        (lambda: index.by_module(q, [-1]), DataError, "document -1 was asked for"),
    ):
        with pytest.raises(error, match=message):
            bad()


def test_cosines_of_what_only_the_query_is_whitened_for_are_refused(tmp_path):
    index = of_kind(tmp_path, "exact int4")
    with pytest.raises(ConfigError, match="a cosine needs documents and queries that are whitened alike") as refusal:
        index.score(queries(index.recipe), unit=True)
    assert refusal.value.field == "unit"
    with pytest.raises(ConfigError, match="a document's score with itself needs"):
        index.self_influence()


def test_entries_beyond_a_module_are_refused():
    gaps, values = torch.tensor([[5, 9]]).to(torch.uint16), torch.ones(1, 2, dtype=torch.int8)
    assert scoring.entry_places(gaps, values, 15, "shard").tolist() == [[5, 14]]
    wide = torch.full((1, 4), 65_535).to(torch.uint16), torch.zeros(1, 4, dtype=torch.int8)
    for bad, numbers in (((gaps, values), 14), (wide, 100_000)):
        with pytest.raises(CheckpointError, match="shard names coordinates that its modules do not have"):
            scoring.entry_places(*bad, numbers, "shard")


@pytest.mark.parametrize("count", [1, 3, 8, 17])
def test_a_few_documents_have_the_scores_that_they_have_among_many(count, tmp_path, monkeypatch):
    index = of_kind(tmp_path, "eigen-topk")
    q = queries(index.recipe, count)
    assert scoring.FEW * 12 * 15 > 63, "all numbers of a query are transposed"
    whole, some = index.score(q).values, index.by_module(q, [3, 9])
    monkeypatch.setattr(scoring, "FEW", 0)
    assert torch.equal(index.score(q).values, whole)
    assert all(torch.equal(x, some[name]) for name, x in index.by_module(q, [3, 9]).items())


@pytest.mark.parametrize("settings", [{}, {"curvature": "kfac"}, {"curvature": "kfac", "kind": "psift"}])
def test_an_index_without_digests_of_its_basis_is_refused(settings):
    with pytest.raises(ConfigError, match="of no use without digests") as refusal:
        sketches.IndexRecipe(settings=sketches.SketchSettings(**settings), modules=recipe().modules, model="m")
    assert refusal.value.field == "basis"


def test_modules_that_cannot_be_indexed_are_refused():
    with pytest.raises(ConfigError, match="set block: 256"):
        recipe("eigen-topk", {"a": (1 << 16, 1 << 16)})
    with pytest.raises(ConfigError, match="needs a module"):
        recipe("psift", {})
    given = vars(recipe())
    with pytest.raises(ConfigError, match="a is twice"):
        sketches.IndexRecipe(**given | {"modules": given["modules"] + given["modules"][:1]})
