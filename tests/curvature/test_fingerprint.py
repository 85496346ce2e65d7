"""Statistics that were measured on other weights are noticed, on any number of ranks, in any dtype."""

import pytest
import torch

import treering as tr
from tests.curvature.texts import documents, packed
from tests.ranks import on_ranks
from tests.zoo import build
from treering.curvature import GradientSettings, add, measure
from treering.curvature import open as open_statistics
from treering.curvature.fingerprint import fingerprints

LENGTHS = (9, 6, 12, 5)


def noted(model, statistics):
    run = tr.compose(model, [tr.OSFT(unmeasured="unprotected")], statistics=statistics)
    return [note for note in run.plan.notes if "measured on other weights" in note]


@pytest.mark.parametrize("gradients", [None, GradientSettings(kind="ekfac")])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_other_weights_of_the_same_shapes_are_noted(arch, gradients, tmp_path):
    measure(build(arch), [packed(documents(LENGTHS))], gradients=gradients, to=tmp_path / "known")
    for statistics in (open_statistics(tmp_path / "known"), measure(build(arch), [packed(documents(LENGTHS))])):
        assert len(statistics.fingerprints) == len(statistics.entries)
        assert not noted(build(arch), statistics)
        [note] = noted(build(arch, seed=1), statistics)
        assert f"{len(statistics.entries)} of {len(statistics.entries)} differ" in note
        trained = build(arch)
        with torch.no_grad():
            trained.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
        [note] = noted(trained, statistics)
        assert f"1 of {len(statistics.entries)} differ from those here (model.layers.1.self_attn.k_proj.weight)" in note


def test_a_measurement_in_bfloat16_is_one_of_the_same_weights():
    narrow = build("llama").bfloat16()
    statistics = measure(narrow, [packed(documents(LENGTHS))])
    assert not noted(build("llama"), statistics)


def test_added_measurements_have_the_fingerprints_of_the_last(tmp_path):
    measure(build("llama"), [packed(documents(LENGTHS))], to=tmp_path / "first")
    after = build("llama", seed=1)
    measure(after, [packed(documents(LENGTHS))], onto=[open_statistics(tmp_path / "first")], to=tmp_path / "both")
    assert open_statistics(tmp_path / "both").fingerprints == fingerprints(after, open_statistics(tmp_path / "first"))
    added = add([tmp_path / "first", tmp_path / "both"], tmp_path / "sum")
    assert added.fingerprints == open_statistics(tmp_path / "both").fingerprints


def of_ranks(arch, sizes):
    run = tr.compose(build(arch), [tr.Full(), tr.Shard()], mesh=tr.mesh(**sizes))
    return fingerprints(run.model, [name for name, _ in run.trainable()])


@pytest.mark.parametrize(("arch", "sizes"), [("llama", {"shard": 2}), ("qwen3_moe", {"shard": 2, "expert": 2})])
def test_ranks_have_those_of_one_process(arch, sizes):
    model = build(arch)
    found = on_ranks(2, of_ranks, arch, sizes)
    assert found[0] == found[1] == fingerprints(model, found[0])
