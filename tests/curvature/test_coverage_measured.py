"""Factors of everything that is covered: by their definitions, on disk, and the same bits on any number of ranks."""

import json

import pytest
import torch

import treering as tr
from tests.curvature.test_capture import Gathered
from tests.curvature.test_coverage import SMALL
from tests.curvature.texts import documents, packed, silent
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build
from treering.core.topology import data_rank
from treering.curvature import GradientSettings, Ring, measure
from treering.curvature import open as open_statistics
from treering.curvature.capture import capture
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.targets import TargetPairs, targets_of

LENGTHS = (12, 7, 5, 9, 3, 14)


def settings(kind="ekfac", **others):
    return GradientSettings(kind=kind, **({"labels": "data", "cover": "all", "vocabulary": SMALL} | others))


def each():
    return [{"input_ids": d[None]} for d in documents(LENGTHS)]


def test_corrected_eigenvalues_are_mean_squares_of_rotated_gradients(tmp_path):
    run = tr.compose(build("qwen2"), [tr.Full()])
    factors = measure(run, each(), gradients=settings(), to=tmp_path / "m").gradients
    counts = torch.bincount(torch.cat([d[:-1] for d in documents(LENGTHS)]), minlength=128)
    assert torch.equal(factors.coverage.counts["model.embed_tokens.weight"], counts.float())
    targets, left_out = targets_of(run.model, run.plan.anatomy, run.plan.maps(), factors.coverage)
    assert factors.left_out == left_out == {} and set(factors) == set(targets)
    sink = Gathered({})
    pairs = TargetPairs(targets.values(), sink)
    with (
        evaluating(run.model),
        capture(run.model, run.plan.anatomy, {t.weight for t in targets.values()}, pairs) as seen,
    ):
        MeasuredModel.of(run, None, None).backward(seen, packed(documents(LENGTHS)), None, "data", 0)
    for name in factors:
        (Q_A, _), (Q_S, _) = (factors[name].basis(side) for side in ("inputs", "gradients"))
        found = [sink.found[name, n] for n in range(len(LENGTHS))]
        squares = sum((Q_S.mT @ G @ Q_A).square() for G in found) / len(found)
        assert_same(factors[name].eigenvalues(), squares, 3e-5, name)


@pytest.mark.parametrize("kind", ["kfac", "shampoo"])
def test_the_moment_of_plain_inputs_stays_what_it_is_without_a_bias(kind):
    run = tr.compose(build("qwen2"), [tr.Full()])
    found = measure(run, each(), gradients=settings(kind))
    wanted = measure(run, each(), gradients=settings(kind, cover="blocks", vocabulary=256))
    assert set(found) == set(wanted) and all(
        found[w]["inputs"].shape[-1] == wanted[w]["inputs"].shape[-1] for w in wanted
    )
    for weight in wanted:
        assert_same(found[weight]["inputs"], wanted[weight]["inputs"], 1e-6, weight)
    q, k = (found.gradients[f"model.layers.0.self_attn.{leaf}.weight"] for leaf in ("q_proj", "k_proj"))
    assert q.basis("inputs")[0].shape == (33, 33)
    assert (q.keys["inputs"] == k.keys["inputs"]) == (kind == "kfac")


def test_blocks_are_written_as_before_and_files_without_the_field_open(tmp_path):
    found = measure(build("llama"), each(), gradients=GradientSettings(kind="kfac", labels="data"), to=tmp_path / "m")
    description = json.loads((tmp_path / "m" / "statistics.json").read_text())
    assert not {"cover", "vocabulary"} & set(description["gradients"])
    assert open_statistics(tmp_path / "m").gradients.settings.cover == "blocks"
    every = measure(build("llama"), each(), gradients=settings("kfac"), to=tmp_path / "all").gradients
    again = open_statistics(tmp_path / "all").gradients
    assert again.settings == settings("kfac") and again.digest == every.digest != found.gradients.digest
    assert again.coverage.vocabulary == SMALL
    file = tmp_path / "all" / "statistics.json"
    description = json.loads(file.read_text())
    for change in ({"cover": "some"}, {"vocabulary": 0}, {"vocabulary": "256"}):
        file.write_text(json.dumps({**description, "gradients": {**description["gradients"], **change}}))
        with pytest.raises(tr.CheckpointError, match="damaged"):
            open_statistics(tmp_path / "all")


def test_settings_that_are_none_are_refused():
    with pytest.raises(tr.ConfigError, match="blocks or all"):
        GradientSettings(cover="heads")
    with pytest.raises(tr.ConfigError, match="a number from 1"):
        GradientSettings(cover="all", vocabulary=0)


def shared_out(sizes, name, kind, to):
    mesh = tr.mesh(**sizes) if sizes else None
    techniques = [tr.TiledLoss(tile=4), tr.Recompute(), *([tr.Shard()] if sizes else [])]
    run = tr.compose(build(name), [tr.Full(), *techniques], mesh=mesh)
    given = documents(LENGTHS)
    bins = [packed(given[:2]), packed(given[2:3]), packed(given[3:5]), packed(given[5:])]
    rank, ranks = data_rank(mesh)
    own = bins[rank::ranks]
    own += [silent()] * (-(-len(bins) // ranks) - len(own))
    found = measure(run, own, gradients=settings(kind, labels="sampled"), to=to)
    return found.gradients.digest, found.digest


@pytest.mark.parametrize("kind", ["ekfac", "tkfac"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_every_bit_is_the_same_on_any_number_of_ranks(kind, name, tmp_path):
    wanted = shared_out({}, name, kind, None)
    assert set(on_ranks(2, shared_out, {"shard": 2}, name, kind, tmp_path / "two")) == {wanted}


def on_a_sequence(sizes, name):
    mesh, techniques = (tr.mesh(**sizes), [tr.Ulysses(), tr.Shard()]) if sizes else (None, [])
    run = tr.compose(build(name, tied=False), [tr.Full(), *techniques], mesh=mesh)
    found = measure(run, [packed(documents((12, 7, 5, 8)))], gradients=settings("kfac"))
    pieces = {(w, side): one.read(one.keys[side]) for w, one in found.gradients.items() for side in SIDES}
    return pieces, found.gradients.coverage.counts


SIDES = ("inputs", "gradients")


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_ranks_that_share_a_sequence_measure_what_one_does(name):
    wanted, counts = on_a_sequence({}, name)
    for pieces, counted in on_ranks(2, on_a_sequence, {"sequence": 2}, name):
        assert all(torch.equal(counted[name], counts[name]) for name in counts)
        assert pieces.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(pieces[key], value, 1e-5, str(key))


class Killed(Exception):
    pass


def test_a_killed_measurement_resumes_and_the_folder_serves_osft(tmp_path):
    run, ring = tr.compose(build("qwen2"), [tr.Full()]), Ring(name="old", tokens=0, data="abc")
    complete = measure(run, each(), gradients=settings(), ring=ring, to=tmp_path / "complete")

    def stop(done, of):
        if done > len(LENGTHS) + 2:
            raise Killed

    with pytest.raises(Killed):
        measure(run, each(), gradients=settings(), ring=ring, to=tmp_path / "killed", progress=stop)
    assert not open_statistics(tmp_path / "killed").gradients.complete
    resumed = measure(run, each(), gradients=settings(), ring=ring, to=tmp_path / "killed")
    assert resumed.gradients.complete and resumed.gradients.digest == complete.gradients.digest
    plain = measure(run, each(), gradients=settings(cover="blocks"), ring=ring)
    counts = []
    for statistics in (open_statistics(tmp_path / "killed"), plain):
        protected = tr.compose(build("qwen2"), [tr.OSFT(protect="inputs")], statistics=statistics)
        counts.append(sum(p.numel() for _, p in protected.trainable()))
    assert counts[0] == counts[1]
