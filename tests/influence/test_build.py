"""An index has the rows that autograd's gradients give, and the same bytes whoever writes which shard."""

import hashlib

import numpy as np
import pytest
import torch

import treering as tr
from tests.curvature.texts import documents, packed
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build as model_of
from treering.anatomy import examine
from treering.core.topology import data_rank
from treering.curvature import GradientSettings, measure
from treering.curvature import open as open_statistics
from treering.curvature.reference import document_gradients
from treering.data.document import Document
from treering.influence import Sketched, build, query_rows
from treering.influence.tokens import token_scores
from treering.sketches import SketchSettings

LENGTHS = (12, 7, 5, 9, 3, 14, 8, 8, 4, 11)
QUERIES = (10, 6)


def texts(lengths=LENGTHS, name="train", seed=0):
    return [
        Document(ids=d.numpy().astype(np.uint32), mask=np.arange(len(d)) > 0, sample_id=f"{name}.jsonl:{i + 1}#0")
        for i, d in enumerate(documents(lengths, seed=seed))
    ]


def known(run, kind="ekfac", to=None):
    given = documents(LENGTHS)
    rank, ranks = data_rank(run.plan.mesh)
    batches = [packed(given[:4]), packed(given[4:7]), packed(given[7:])][rank::ranks]
    from tests.curvature.texts import silent

    batches += [silent()] * (-(-3 // ranks) - len(batches))
    return measure(run, batches, gradients=GradientSettings(kind=kind, labels="data"), to=to)


SETTINGS = {
    "exact": SketchSettings(kind="exact", storage="float32"),
    "exact kfac": SketchSettings(kind="exact", curvature="kfac", storage="float32"),
    "all coordinates": SketchSettings(kind="eigen-topk", entries=100_000, restore_norm=False),
    "products of gradients": SketchSettings(kind="exact", curvature="identity", storage="float32"),
    "no projection": SketchSettings(kind="psift", curvature="identity", size=1000, storage="float32"),
}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("which", SETTINGS)
def test_scores_are_products_of_gradients_and_inverse(name, which, tmp_path):
    settings = SETTINGS[which]
    run = tr.compose(model_of(name), [tr.Full()])
    statistics = None if settings.curvature == "identity" else known(run, settings.curvature)
    index = build(run, texts(), tmp_path / "index", settings=settings, statistics=statistics, capacity=32)
    assert sorted(index.all_ids()) == sorted(d.sample_id for d in texts())
    sketched = Sketched.of(run, settings, statistics)
    queries = query_rows(sketched, texts(QUERIES, "query", seed=5))
    found = index.score(queries)
    model = model_of(name).double().eval()
    anatomy = examine(model)
    gradients = [document_gradients(model, anatomy, d) for d in documents(LENGTHS)]
    asked = [document_gradients(model, anatomy, d) for d in documents(QUERIES, seed=5)]
    order = {sample: i for i, sample in enumerate(index.all_ids())}
    wanted = torch.zeros(len(LENGTHS), len(QUERIES), dtype=torch.float64)
    for weight in sketched.targets:
        for i, G in enumerate(gradients):
            for j, q in enumerate(asked):
                wanted[order[texts()[i].sample_id], j] += (
                    _inverse(q[weight], weight, statistics, settings) * G[weight]
                ).sum()
    assert_same(found if isinstance(found, torch.Tensor) else found.values, wanted, 0.02 if "all" in which else 2e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "more", [(), (tr.TiledBlock(tile=5), tr.TiledLoss(tile=4), tr.Recompute())], ids=["plain", "all"]
)
@pytest.mark.parametrize("which", ["exact", "all coordinates", "no projection"])
def test_the_scores_of_tokens_add_up(name, more, which, tmp_path):
    settings = SETTINGS[which]
    run = tr.compose(model_of(name), [tr.Full(), *more])
    statistics = None if settings.curvature == "identity" else known(run, settings.curvature)
    index = build(run, texts(), tmp_path / "index", settings=settings, statistics=statistics, capacity=32)
    sketched = Sketched.of(run, settings, statistics)
    queries = query_rows(sketched, texts(QUERIES, "query", seed=5))
    wanted = index.score(queries).values
    place = {sample: i for i, sample in enumerate(index.all_ids())}
    for document, found in zip(texts(), token_scores(sketched, texts(), queries)):
        assert found.shape == (len(document.ids), len(QUERIES)) and not found[-1].any()  # it has no label
        scale = wanted.abs().max(0).values
        row = wanted[place[document.sample_id]]
        assert_same(torch.tensor(found.sum(0)) / scale, row / scale, 0.05 if "all" in which else 1e-4)


def _inverse(G, weight, statistics, settings):
    if statistics is None:
        return G
    one = statistics.gradients[weight]
    (Q_A, _), (Q_S, _) = (one.basis(side) for side in ("inputs", "gradients"))
    Q_A, Q_S, values = Q_A.double(), Q_S.double(), one.eigenvalues().double()
    damped = values + settings.damping * values.mean((-2, -1), keepdim=True)
    return Q_S @ ((Q_S.mT @ G @ Q_A) / damped) @ Q_A.mT


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def built(sizes, name, settings, root):
    mesh = tr.mesh(**sizes) if sizes else None
    run = tr.compose(model_of(name), [tr.Full(), *([tr.Shard()] if sizes else [])], mesh=mesh)
    statistics = known(run, settings.curvature, root / "statistics")
    build(run, texts(), root / "index", settings=settings, statistics=statistics, capacity=20)
    return statistics.gradients.digest


PSIFT = SketchSettings(kind="psift", curvature="kfac", size=8)


@pytest.mark.parametrize("settings", [SketchSettings(entries=20), PSIFT], ids=lambda s: s.kind)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_byte_is_the_same_on_any_number_of_ranks(settings, name, tmp_path):
    wanted = built({}, name, settings, tmp_path / "one")
    files = digests(tmp_path / "one" / "index")
    assert len(files) > 3  # several shards
    for sizes in [{"shard": 2}] + [{"shard": 3}] * (name == "llama"):
        root = tmp_path / str(sizes)
        ranks = torch.Size(sizes.values()).numel()
        assert set(on_ranks(ranks, built, sizes, name, settings, root)) == {wanted}
        assert digests(root / "index") == files


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"shard": 4}, {"replicate": 2, "shard": 2}], ids=str)
def test_four_ranks_write_the_same_bytes(sizes, tmp_path):
    wanted = built({}, "llama", PSIFT, tmp_path / "one")
    assert set(on_ranks(4, built, sizes, "llama", PSIFT, tmp_path / "four")) == {wanted}
    assert digests(tmp_path / "four" / "index") == digests(tmp_path / "one" / "index")


class Killed(Exception):
    pass


def test_a_build_that_was_killed_keeps_its_complete_shards(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full()])
    statistics = known(run)
    every: list[tuple[int, int]] = []
    build(run, texts(), tmp_path / "whole", statistics=statistics, capacity=20, progress=lambda *at: every.append(at))

    def stop(done, of):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        build(run, texts(), tmp_path / "killed", statistics=statistics, capacity=20, progress=stop)
    steps: list[tuple[int, int]] = []
    build(run, texts(), tmp_path / "killed", statistics=statistics, capacity=20, progress=lambda *at: steps.append(at))
    assert 0 < len(steps) < len(every)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_complete_index_is_returned_and_another_is_not_written_over_it(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full()])
    statistics = known(run)
    build(run, texts(), tmp_path / "i", statistics=statistics, capacity=20)
    before, steps = digests(tmp_path / "i"), []
    again = build(
        run, texts(), tmp_path / "i", statistics=statistics, capacity=20, progress=lambda *at: steps.append(at)
    )
    assert digests(tmp_path / "i") == before and not steps
    assert sorted(again.all_ids()) == sorted(document.sample_id for document in texts())
    with pytest.raises(tr.CheckpointError, match="has a complete index"):
        build(run, texts()[1:], tmp_path / "i", statistics=statistics, capacity=20)


def test_the_same_documents_have_the_same_scores(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full()])
    twice = [*texts(), *texts(name="again")]
    statistics = known(run)
    index = build(run, twice, tmp_path / "i", statistics=statistics, capacity=64)
    scores = index.score(query_rows(Sketched.of(run, SketchSettings(), statistics), texts(QUERIES, "q", seed=5)))
    values = scores if isinstance(scores, torch.Tensor) else scores.values
    place = {sample: i for i, sample in enumerate(index.all_ids())}
    for document in texts():
        one, other = (values[place[n]] for n in (document.sample_id, document.sample_id.replace("train", "again")))
        assert_same(one, other, 0.02)


def test_what_does_not_fit_is_refused_before_any_work(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full()])
    with pytest.raises(tr.CheckpointError, match="there are no statistics"):
        build(run, texts(), tmp_path / "i")
    with pytest.raises(tr.CheckpointError, match="has none of gradients"):
        build(run, texts(), tmp_path / "i", statistics=tr.measure(run, [packed(documents(LENGTHS))]))
    statistics = known(run, "kfac", tmp_path / "kfac")
    with pytest.raises(tr.CheckpointError, match=r"does not fit the index: .* measured for kfac, not for ekfac"):
        build(run, texts(), tmp_path / "i", statistics=statistics)
    with torch.no_grad():
        run.model.model.layers[0].mlp.up_proj.weight[3, 3] += 0.5
    with pytest.raises(tr.CheckpointError, match="measured on other weights"):
        build(run, texts(), tmp_path / "i", statistics=open_statistics(tmp_path / "kfac"), settings=PSIFT)
    with pytest.raises(tr.DataError, match="no document to index"):
        build(run, [], tmp_path / "i", settings=SETTINGS["products of gradients"])
    assert not (tmp_path / "i").exists() or not any((tmp_path / "i").iterdir())


def test_a_document_whose_gradient_is_not_finite_is_named(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full()])
    with torch.no_grad():
        run.model.model.embed_tokens.weight[texts()[4].ids[1]] = torch.inf
    with pytest.raises(tr.DataError, match=r"gradient of train\.jsonl:\d+#0 is not finite"):
        build(run, texts(), tmp_path / "i", settings=SETTINGS["products of gradients"], capacity=32)
