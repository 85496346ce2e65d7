"""Factors and corrected eigenvalues: by their definitions, and the same bits however the documents are shared out."""

import json

import pytest
import torch

import treering as tr
from tests.curvature.texts import documents, packed, rows, silent
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build
from treering.anatomy import examine
from treering.core.topology import data_rank
from treering.curvature import GradientSettings, Ring, measure
from treering.curvature import open as open_statistics
from treering.curvature.reference import document_gradients, factors

LENGTHS = (12, 7, 5, 9, 3, 14)
KINDS = ["kfac", "ekfac", "shampoo", "tkfac"]


def settings(kind="ekfac", **others):
    return GradientSettings(kind=kind, **({"labels": "data"} | others))


def each(lengths=LENGTHS):
    return [{"input_ids": d[None]} for d in documents(lengths)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_the_definition(name, kind):
    model = build(name).double()
    wanted = factors(model, examine(model), documents(LENGTHS), kind)
    found = measure(model, each(), gradients=settings(kind)).gradients
    assert found.documents == len(LENGTHS) and found.tokens == sum(LENGTHS) - len(LENGTHS)
    assert set(found) == set(wanted)
    assert set(found.left_out) == {"transformer.wte.weight" if name == "gpt2" else "lm_head.weight"}
    for weight, (A, S, c) in wanted.items():
        one = found[weight]
        for side, matrix in (("inputs", A), ("gradients", S)):
            assert_same(one.read(one.keys[side]), matrix, 1e-6, f"{side} of {weight}")
            Q, values = one.basis(side)
            assert_same(Q.mT @ Q, torch.eye(len(Q)), 1e-5)
            assert_same(Q * values @ Q.mT, matrix, 3e-6)
            assert bool((Q.gather(0, Q.abs().argmax(0, keepdim=True)) > 0).all())
        assert_same(one.scale, c.double(), 1e-6)
        if kind in ("shampoo", "tkfac"):  # the trace of H is that of the Fisher information
            gradients = [document_gradients(model, examine(model), d)[weight] for d in documents(LENGTHS)]
            trace = sum(float(G.square().sum()) for G in gradients) / len(gradients)
            assert abs(float(one.eigenvalues().double().sum()) / trace - 1) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("experts", ["each", "pooled"])
def test_corrected_eigenvalues_are_mean_squares_of_rotated_gradients(name, experts):
    model = build(name).double()
    found = measure(model, each(), gradients=settings(experts=experts)).gradients
    gradients = [document_gradients(model.eval(), examine(model), d) for d in documents(LENGTHS)]
    for weight in found:
        (Q_A, _), (Q_S, _) = (found[weight].basis(side) for side in ("inputs", "gradients"))
        squares = sum((Q_S.double().mT @ G[weight] @ Q_A.double()).square() for G in gradients) / len(gradients)
        if squares.ndim == 3 and experts == "pooled":
            squares = squares.mean(0)
        assert_same(found[weight].eigenvalues(), squares, 2e-6, weight)
        total = sum(G[weight].square().sum() for G in gradients) / len(gradients)
        count = len(gradients[0][weight]) if experts == "pooled" and gradients[0][weight].ndim == 3 else 1
        assert abs(float(found[weight].eigenvalues().sum() * count / total) - 1) < 1e-5  # a rotation keeps the trace


def test_experts_are_measured_as_if_each_were_a_layer():
    model = build("qwen3_moe").double()
    found = measure(model, each(), gradients=settings("kfac"))
    known = tr.measure(model, each())
    for weight in [w for w in known if known[w]["inputs"].ndim == 3]:
        one = found.gradients[weight]
        assert one.scale.shape == (4,) and found[weight]["tokens"].tolist() != known[weight]["tokens"].tolist()
        assert int(found[weight]["tokens"].sum()) == 2 * found.gradients.tokens  # two experts a token
        G = [document_gradients(model.eval(), examine(model), d)[weight] for d in documents(LENGTHS)]
        unused = [e for e in range(4) if not any(x[e].any() for x in G)]
        assert not any(one.read(one.keys["gradients"])[e].any() for e in unused)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [packed, rows], ids=["packed", "rows"])
def test_what_else_is_in_a_batch_changes_nothing(kind, form):
    run = tr.compose(build("llama"), [tr.Full()])
    wanted = measure(run, each(), gradients=settings(kind, labels="sampled")).gradients
    given = documents(LENGTHS)
    found = measure(run, [form(given[:4]), form(given[4:])], gradients=settings(kind, labels="sampled")).gradients
    for weight in wanted:
        for piece in ("inputs", "gradients"):
            one = [x[weight].read(x[weight].keys[piece]) for x in (found, wanted)]
            assert_same(*one, 2e-6, f"{piece} of {weight}")
        assert_same(found[weight].scale, wanted[weight].scale, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_and_tiles_change_nothing(kind):
    plain = tr.compose(build("qwen3_moe"), [tr.Full()])
    techniques = [tr.TiledBlock(tile=5), tr.TiledLoss(tile=4), tr.Recompute()]
    tiled = tr.compose(build("qwen3_moe"), [tr.Full(), *techniques])
    batches = [packed(documents(LENGTHS[:4])), packed(documents(LENGTHS[4:], seed=1))]
    wanted, found = (measure(run, batches, gradients=settings(kind, labels="sampled")) for run in (plain, tiled))
    for weight in wanted.gradients:
        pair = [x.gradients[weight] for x in (found, wanted)]
        for piece in ("inputs", "gradients"):
            assert_same(*(one.read(one.keys[piece]) for one in pair), 3e-6, f"{piece} of {weight}")
        assert_same(*(one.scale for one in pair), 1e-5)
        assert_same(*(torch.sort(one.eigenvalues().flatten())[0] for one in pair), 2e-3, weight)


def shared_out(sizes, name, kind, to):
    mesh = tr.mesh(**sizes) if sizes else None
    run = tr.compose(build(name), [tr.Full(), *([tr.Shard()] if sizes else [])], mesh=mesh)
    given = documents(LENGTHS)
    bins = [packed(given[:2]), packed(given[2:3]), packed(given[3:5]), packed(given[5:])]
    rank, ranks = data_rank(mesh)
    own = bins[rank::ranks]
    own += [silent()] * (-(-len(bins) // ranks) - len(own))
    found = measure(run, own, gradients=settings(kind, labels="sampled"), to=to, memory_limit=60_000)
    return found.gradients.digest, found.digest


@pytest.mark.parametrize("kind", ["ekfac", "shampoo", "tkfac"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_bit_is_the_same_on_any_number_of_ranks(kind, name, tmp_path):
    wanted = shared_out({}, name, kind, None)
    assert shared_out({}, name, kind, tmp_path / "again") == wanted
    meshes = [{"shard": 2}, {"shard": 3}] if kind == "ekfac" else [{"replicate": 2, "shard": 1}]
    for i, sizes in enumerate(meshes):
        ranks = torch.Size(sizes.values()).numel()
        assert set(on_ranks(ranks, shared_out, sizes, name, kind, tmp_path / str(i))) == {wanted}


@pytest.mark.slow
def test_every_bit_is_the_same_on_four_ranks(tmp_path):
    wanted = shared_out({}, "llama", "ekfac", None)
    for i, sizes in enumerate([{"shard": 4}, {"replicate": 2, "shard": 2}]):
        assert set(on_ranks(4, shared_out, sizes, "llama", "ekfac", tmp_path / str(i))) == {wanted}


class Killed(Exception):
    pass


def test_a_measurement_that_ended_before_its_correction_goes_on_with_it(tmp_path):
    model, ring = build("llama"), Ring(name="old", tokens=0, data="abc")
    whole = measure(model, each(), gradients=settings(), ring=ring, to=tmp_path / "whole")
    calls = []

    def stop(done, of):
        calls.append((done, of))
        if done > len(LENGTHS) + 2:
            raise Killed

    with pytest.raises(Killed):
        measure(model, each(), gradients=settings(), ring=ring, to=tmp_path / "killed", progress=stop)
    assert calls[0] == (1, 2 * len(LENGTHS))
    half = open_statistics(tmp_path / "killed").gradients
    assert not half.complete and whole.gradients.complete
    calls.clear()
    resumed = measure(
        model, each(), gradients=settings(), ring=ring, to=tmp_path / "killed", progress=lambda *at: calls.append(at)
    )
    assert calls[-1] == (len(LENGTHS), len(LENGTHS))  # Λ alone
    assert resumed.gradients.digest == whole.gradients.digest and resumed.gradients.complete
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    other = measure(model, each(), gradients=settings(), ring=ring, to=tmp_path / "killed")
    assert other.gradients.digest != whole.gradients.digest  # other weights: measured again


def test_a_damaged_description_is_refused(tmp_path):
    measure(build("llama"), each(), gradients=settings("kfac"), to=tmp_path / "m")
    file = tmp_path / "m" / "statistics.json"
    description = json.loads(file.read_text())
    for change in ({"kind": "other"}, {"seed": "0"}, {"weights": {"x": {"scale": 1.0, "keys": {}}}}):
        file.write_text(json.dumps({**description, "gradients": {**description["gradients"], **change}}))
        with pytest.raises(tr.CheckpointError, match="damaged"):
            open_statistics(tmp_path / "m")


def test_gradients_are_not_added_to_earlier_measurements(tmp_path):
    model = build("llama")
    with pytest.raises(tr.PlanError, match="inputs only"):
        measure(model, each(), gradients=settings(), onto=[tr.measure(model, each())])


def shared_rows(kind):
    run = tr.compose(build("llama"), [tr.Full(), tr.Ulysses(), tr.Shard()], mesh=tr.mesh(shard=1, sequence=2))
    with pytest.raises(tr.PlanError, match="complete gradient of each document"):
        measure(run, [packed(documents(LENGTHS))], gradients=settings(kind))


@pytest.mark.parametrize("kind", ["ekfac"])
def test_squares_of_documents_that_ranks_share_are_refused(kind):
    on_ranks(2, shared_rows, kind)
