"""An index of all parameters: products of gradients with what autograd gives, and one word for what is covered."""

import pytest

import treering as tr
from tests.curvature.test_targets import alone
from tests.curvature.texts import documents, packed
from tests.influence.test_build import LENGTHS, QUERIES, digests, texts
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build as model_of
from treering.core.topology import data_rank
from treering.curvature import GradientSettings, measure
from treering.influence import Sketched, build, query_rows
from treering.sketches import SketchSettings

PLAIN = SketchSettings(kind="exact", curvature="identity", storage="float32")


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_scores_are_products_of_the_gradients_of_all_parameters(name, tmp_path):
    run = tr.compose(model_of(name), [tr.Full()])
    index = build(run, texts(), tmp_path / "index", settings=PLAIN, capacity=32, cover="all")
    sketched = Sketched.of(run, PLAIN, None, cover="all")
    index.check(sketched.recipe)
    assert not sketched.left_out
    found = index.score(query_rows(sketched, texts(QUERIES, "query", seed=5))).values
    asked = [alone(run, ids) for ids in documents(QUERIES, seed=5)]
    place = {sample: i for i, sample in enumerate(index.all_ids())}
    for document, ids in zip(texts(), documents(LENGTHS)):
        G = alone(run, ids)
        for j, q in enumerate(asked):
            wanted = sum((G[name] * q[name]).sum() for name in G)
            assert_same(found[place[document.sample_id], j], wanted, 1e-4, document.sample_id)
    with pytest.raises(tr.CheckpointError):
        index.check(Sketched.of(run, PLAIN, None).recipe)


def test_statistics_and_index_cover_the_same(tmp_path):
    run = tr.compose(model_of("qwen2"), [tr.Full()])
    batches = [packed(documents(LENGTHS))]
    settings = SketchSettings(kind="eigen-topk")
    for measured, asked in (("blocks", "all"), ("all", "blocks")):
        known = measure(run, batches, gradients=GradientSettings(labels="data", cover=measured, vocabulary=16))
        with pytest.raises(tr.CheckpointError, match=f"with cover {measured}, not {asked}"):
            Sketched.of(run, settings, known, cover=asked)
        index = build(
            run, texts(), tmp_path / measured, settings=settings, statistics=known, capacity=32, cover=measured
        )
        shapes = {module.name: (module.outputs, module.inputs) for module in index.recipe.modules}
        if measured == "all":
            assert shapes["lm_head.weight"] == (16, 32) and shapes["model.embed_tokens.weight"] == (32, 16)
            assert shapes["model.norm.weight"] == (32, 1)
            assert shapes["model.layers.0.self_attn.q_proj.weight"] == (32, 33)
        else:
            assert "lm_head.weight" not in shapes and "covered" not in index.recipe.about


def built(sizes, settings, root):
    run = tr.compose(
        model_of("qwen3_moe"), [tr.Full(), *([tr.Shard()] if sizes else [])], mesh=tr.mesh(**sizes) if sizes else None
    )
    given = documents(LENGTHS)
    rank, ranks = data_rank(run.plan.mesh)
    batches = [packed(given[:4]), packed(given[4:])][rank::ranks]
    how = GradientSettings(kind=settings.curvature, cover="all", vocabulary=16)
    known = measure(run, batches, gradients=how, to=root / "statistics")
    build(run, texts(), root / "index", settings=settings, statistics=known, capacity=20, cover="all")
    return known.gradients.digest


SKETCHES = [SketchSettings(entries=20), SketchSettings(kind="psift", curvature="kfac", size=8)]


@pytest.mark.parametrize("settings", SKETCHES, ids=lambda settings: settings.kind)
def test_every_byte_is_the_same_on_two_ranks(settings, tmp_path):
    wanted = built({}, settings, tmp_path / "one")
    assert set(on_ranks(2, built, {"shard": 2}, settings, tmp_path / "two")) == {wanted}
    assert digests(tmp_path / "two" / "index") == digests(tmp_path / "one" / "index")
