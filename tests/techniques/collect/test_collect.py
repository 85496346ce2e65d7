"""Rows that are collected in training are those of an index of the same weights, and training does not change."""

import hashlib
import shutil

import numpy as np
import pytest
import torch

import treering as tr
from tests.curvature.texts import documents
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build as model_of
from treering.core.topology import data_rank
from treering.curvature import GradientSettings, measure
from treering.curvature import open as open_statistics
from treering.data.document import Document
from treering.data.loader import collate
from treering.influence import build
from treering.sketches import SketchSettings
from treering.sketches import open as open_index

LENGTHS = (9, 6, 12, 5, 7, 4, 10, 8)


def texts():
    return [
        Document(ids=d.numpy().astype(np.uint32), mask=np.arange(len(d)) > 2, sample_id=f"a.jsonl:{i + 1}#0")
        for i, d in enumerate(documents(LENGTHS))
    ]


def bins(step, rank=0, ranks=1):
    """Two bins a step, as any number of ranks up to two shares them."""
    given = texts()[4 * step : 4 * step + 4]
    count = int(sum(d.mask.sum() for d in given))
    return [collate(pair, count, "cpu") for pair in (given[:2], given[2:])][rank::ranks]


def factors(techniques, name="llama", kind="kfac", to=None, cover="blocks"):
    run = tr.compose(model_of(name), techniques)
    batches = [collate(texts()[i : i + 4], 0, "cpu") for i in (0, 4)]
    return measure(run, batches, gradients=GradientSettings(kind=kind, labels="data", cover=cover), to=to)


def trained(techniques, statistics=None, mesh=None, slope=1.0, lr=1e-3, name="llama", steps=2, finish=True):
    run = tr.compose(model_of(name), techniques, statistics=statistics, mesh=mesh)
    optimizer = run.optimizer(torch.optim.SGD, lr=lr)
    rank, ranks = data_rank(mesh)
    for step in range(steps):
        for batch in run.ready(bins(step, rank, ranks)):
            (run.loss(batch) * slope).backward()
        run.step(optimizer)
    if finish:
        run.finish()
    return run


def rows_by_id(folder):
    index = open_index(folder)
    ids = list(index.all_ids())
    dense = index.dense(0, len(ids))
    return {name.rpartition("@")[0] or name: row for name, row in zip(ids, dense)}


SURROUNDED = [tr.TiledBlock(tile=5), tr.TiledLoss(tile=4), tr.Recompute()]


@pytest.mark.parametrize("base, more", [("full", ()), ("full", SURROUNDED), ("lora", ()), ("lora", SURROUNDED)])
@pytest.mark.parametrize("slope", [1.0, 512.0])
def test_rows_are_those_of_an_index_of_the_same_weights(base, more, slope, tmp_path):
    if slope != 1.0 and more:
        pytest.skip("shown by the others")
    train = tr.Full() if base == "full" else tr.LoRA(rank=4)
    identity = tr.Collect(to=str(tmp_path / "rows"), kind="exact", curvature="identity")
    run = trained([train, *more, identity], slope=slope, lr=0.0)
    found = rows_by_id(tmp_path / "rows")
    built = build(
        tr.compose(model_of("llama"), [train]), texts(), tmp_path / "built",
        settings=SketchSettings(kind="exact", curvature="identity"), capacity=32,
    )  # fmt: skip
    wanted = rows_by_id(built.folder)
    assert set(found) == set(wanted) == {d.sample_id for d in texts()}
    for sample in wanted:
        assert_same(found[sample], wanted[sample], 0.012, sample)  # both are int8
    assert run.metrics()["collect/documents"] == len(texts())


PARTS = tr.Full(train=("*norm*", "*gate.weight", "*embed*", "lm_head"))
BASES = [
    ("llama", tr.Full(), "blocks"),
    ("qwen3_moe", tr.LoRA(rank=2), "blocks"),
    ("qwen3", tr.Full(), "all"),
    ("qwen3_moe", PARTS, "all"),
]


@pytest.mark.parametrize("name, base, cover", BASES)
def test_training_is_the_same_bit_for_bit(name, base, cover, tmp_path):
    statistics = factors([base], name, cover=cover)
    collect = tr.Collect(to=str(tmp_path / "rows"), cover=cover)
    plain = trained([base], name=name)
    observed = trained([base, collect], statistics, name=name)
    for (one, p), (other, q) in zip(plain.trainable(), observed.trainable()):
        assert one == other and torch.equal(p, q), one
    index = open_index(tmp_path / "rows")
    assert sorted(index.all_ids()) == sorted(f"{d.sample_id}@{i // 4}" for i, d in enumerate(texts()))


def test_rows_of_all_parameters_are_those_of_an_index_of_them(tmp_path):
    collect = tr.Collect(to=str(tmp_path / "rows"), kind="exact", curvature="identity", cover="all")
    trained([tr.Full(), *SURROUNDED, collect], lr=0.0, name="qwen2")
    found = rows_by_id(tmp_path / "rows")
    built = build(
        tr.compose(model_of("qwen2"), [tr.Full()]), texts(), tmp_path / "built",
        settings=SketchSettings(kind="exact", curvature="identity"), capacity=32, cover="all",
    )  # fmt: skip
    wanted = rows_by_id(built.folder)
    assert len(built.recipe.modules) == 14 + 5 + 2
    for sample in wanted:
        assert_same(found[sample], wanted[sample], 0.012, sample)
    with pytest.raises(tr.PlanError, match="measured with cover blocks, not all"):
        trained([tr.Full(), tr.Collect(to=str(tmp_path / "other"), cover="all")], factors([tr.Full()], name="qwen2"))
    with pytest.raises(tr.ConfigError, match="blocks or all"):
        tr.Collect(cover="some")


def collected(folder, sizes, kind, curvature, statistics, cover):
    mesh = tr.mesh(**sizes) if sizes else None
    collect = tr.Collect(to=str(folder), kind=kind, curvature=curvature, cover=cover)
    trained([tr.Full(), collect, *([tr.Shard()] if sizes else [])], open_statistics(statistics), mesh)


@pytest.mark.parametrize("kind, curvature, cover", [("psift", "kfac", "all"), ("eigen-topk", "ekfac", "blocks")])
def test_two_ranks_write_the_same_bytes(kind, curvature, cover, tmp_path):
    factors([tr.Full()], kind="ekfac", to=tmp_path / "statistics", cover=cover)
    collected(tmp_path / "one", {}, kind, curvature, tmp_path / "statistics", cover)
    on_ranks(2, collected, tmp_path / "two", {"shard": 2}, kind, curvature, tmp_path / "statistics", cover)
    one, two = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / name).iterdir())}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 2


def test_evaluation_is_not_collected_and_a_loss_of_ones_own_is_refused(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=str(tmp_path / "i"), curvature="identity")])
    optimizer = run.optimizer(lr=1e-3)
    [batch, _] = run.ready(bins(0))
    with torch.no_grad():
        run.loss(batch)
    run.scores(batch)
    assert run.metrics()["collect/documents"] == 0
    run.loss(batch).backward()
    run.step(optimizer)
    assert run.metrics()["collect/documents"] == 2
    run.model(input_ids=batch["input_ids"]).logits.sum().backward()
    with pytest.raises(tr.PlanError, match=r"run.loss"):
        run.step(optimizer)


def test_a_document_whose_gradient_is_not_finite_has_no_row(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=str(tmp_path / "i"), curvature="identity")])
    with torch.no_grad():
        run.model.model.embed_tokens.weight[int(texts()[1].ids[2])] = torch.nan
    for batch in run.ready(bins(0)):
        run.loss(batch).backward()
    metrics = run.metrics()
    assert metrics["collect/dropped"] >= 1 and metrics["collect/dropped"] + metrics["collect/documents"] == 4


def test_documents_of_a_skipped_step_have_no_row(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=str(tmp_path / "i"), curvature="identity")])
    optimizer = run.optimizer(torch.optim.SGD, lr=1e-3)
    for step in range(2):
        for number, batch in enumerate(run.ready(bins(step))):
            (run.loss(batch) * (torch.inf if step == number == 0 else 1.0)).backward()
        assert run.step(optimizer).skipped == (step == 0)
        optimizer.zero_grad()
    for batch in run.ready(bins(0)):  # no step follows
        run.loss(batch).backward()
    run.finish()
    assert sorted(open_index(tmp_path / "i").all_ids()) == sorted(f"{d.sample_id}@0" for d in texts()[4:])
    assert run.metrics() == {"collect/documents": 4.0, "collect/dropped": 8.0}


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    techniques = [tr.Full(), tr.Collect(to=str(tmp_path / "rows"), curvature="identity")]
    run = tr.compose(model_of("llama"), techniques)
    optimizer = run.optimizer(torch.optim.SGD, lr=1e-3)
    states = [a.state for a in run.plan.applied if a.state is not None]

    def step(run, optimizer, number):
        for batch in run.ready(bins(number)):
            run.loss(batch).backward()
        run.step(optimizer)

    step(run, optimizer, 0)
    saved = {name: value.clone() for name, value in states[0]().items()}
    parameters = {name: p.detach().clone() for name, p in run.trainable()}
    step(run, optimizer, 1)
    states[0]()  # a later checkpoint, which is lost
    again = tr.compose(model_of("llama"), techniques)
    with torch.no_grad():
        for name, p in again.trainable():
            p.copy_(parameters[name])
    for name, value in next(a.state for a in again.plan.applied if a.state is not None)().items():
        value.copy_(saved[name])
    step(again, again.optimizer(torch.optim.SGD, lr=1e-3), 1)
    again.finish()
    index = open_index(tmp_path / "rows")
    assert sorted(index.all_ids()) == sorted(f"{d.sample_id}@{i // 4}" for i, d in enumerate(texts()))


def test_what_cannot_be_collected_is_refused(tmp_path):
    to = str(tmp_path / "i")
    with pytest.raises(tr.PlanError, match=r"no statistics with gradients"):
        tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=to)])
    with pytest.raises(tr.PlanError, match=r"no factors of .*which trains"):
        tr.compose(model_of("llama"), [tr.LoRA(rank=2), tr.Collect(to=to)], statistics=factors([tr.Full()]))
    with pytest.raises(tr.PlanError, match="compiled blocks"):
        tr.compose(model_of("llama"), [tr.Full(), tr.Compile(backend="eager"), tr.Collect(to=to, curvature="identity")])
    with pytest.raises(tr.ConfigError, match="corrected eigenvalues"):
        tr.Collect(to=to, kind="psift", curvature="ekfac")
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=to, curvature="identity")])
    short = [{**batch, "samples": batch["samples"][:1]} for batch in bins(0)]
    with pytest.raises(tr.DataError, match="give each micro-batch `samples`"):
        run.loss(run.ready(short)[0])


def test_documents_without_names_are_named_by_their_tokens(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=str(tmp_path / "i"), curvature="identity")])
    optimizer = run.optimizer(lr=0.0)
    for _ in range(2):
        unnamed = [{name: value for name, value in batch.items() if name != "samples"} for batch in bins(0)]
        for batch in run.ready(unnamed):
            run.loss(batch).backward()
        run.step(optimizer)
    run.finish()
    ids = list(open_index(tmp_path / "i").all_ids())
    assert len(set(ids)) == 8 and len({name.partition("@")[0] for name in ids}) == 4


def test_a_gradient_scaler_that_skips_a_step_leaves_no_row(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=str(tmp_path / "i"), curvature="identity")])
    optimizer = run.optimizer(torch.optim.SGD, lr=1e-3)
    run.attach(optimizer)
    for step in range(2):
        for batch in run.ready(bins(step)):
            run.loss(batch).backward()
        if step:  # of the other one the scaler found that it had overflowed
            optimizer.step()
        optimizer.zero_grad()
    run.finish()
    assert sorted(open_index(tmp_path / "i").all_ids()) == sorted(f"{d.sample_id}@0" for d in texts()[4:])
    assert run.metrics() == {"collect/documents": 4.0, "collect/dropped": 4.0}


def test_a_loop_whose_steps_are_not_seen_is_refused(tmp_path):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Collect(to=str(tmp_path / "i"), curvature="identity")])
    optimizer = run.optimizer(torch.optim.SGD, lr=1e-3)
    for batch in run.ready(bins(0)):
        run.loss(batch).backward()
    optimizer.step()
    with pytest.raises(tr.PlanError, match=r"no step was seen .* run\.attach\(optimizer\)"):
        run.finish()


def cannot_write(folder):
    mesh = tr.mesh(replicate=2)
    techniques = [tr.Full(), tr.Collect(to=str(folder), curvature="identity"), tr.Shard()]
    run = trained(techniques, mesh=mesh, finish=False)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder)
        folder.write_text("in its place")
    torch.distributed.barrier()
    with pytest.raises(tr.CheckpointError, match="cannot be written"):
        run.finish()


def test_rows_that_cannot_be_written_are_an_error_on_every_rank(tmp_path):
    on_ranks(2, cannot_write, tmp_path / "rows")
