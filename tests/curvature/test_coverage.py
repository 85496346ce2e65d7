"""Everything that is covered has autograd's gradient, document by document: biases, norms, routers, embedding, head."""

import pytest
import torch

import treering as tr
from tests.curvature.test_capture import Gathered
from tests.curvature.test_targets import LENGTHS, alone
from tests.curvature.texts import documents, packed, rows
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build
from treering.curvature.capture import capture
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.targets import TargetPairs, targets_of
from treering.curvature.vocabulary import Coverage, VocabularySide

COUNTS = torch.arange(128.0)
SMALL = 16  # numbers that are kept of the vocabulary of 128


def covered(run, vocabulary=SMALL):
    anatomy = run.plan.anatomy
    counts = {f"{anatomy.embeddings[0]}.weight": COUNTS}
    return targets_of(run.model, anatomy, run.plan.maps(), Coverage(of="all", vocabulary=vocabulary, counts=counts))


def gradients(run, batch, vocabulary=SMALL):
    """Return the targets, and the gradient of each and each document as it is seen."""
    targets, reasons = covered(run, vocabulary)
    sink = Gathered({t.name: (*t.lead, t.outputs, t.inputs) for t in targets.values()})
    pairs = TargetPairs(targets.values(), sink)
    with (
        evaluating(run.model),
        capture(run.model, run.plan.anatomy, {t.weight for t in targets.values()}, pairs) as seen,
    ):
        MeasuredModel.of(run, None, None).backward(seen, batch, batch.get("attention_mask"), "data", 0)
    return targets, reasons, sink.found


def whole(run, wanted, target):
    """Return the gradient of a target, with that of its bias, from those of its parameters; projected as it is."""
    gradient = wanted[target.name]
    if gradient.ndim == len(target.lead) + 1:
        gradient = gradient[..., None]
    module = run.model.get_submodule(target.name.rpartition(".")[0])
    if type(module).__name__ in ("Conv1D", "GptOssExperts") and gradient.shape[-1] != 1:
        gradient = gradient.mT
    if target.bias is not None:
        gradient = torch.cat([gradient, wanted[target.bias][..., None]], -1)
    head = run.plan.anatomy.head
    if target.projected and target.name == head.weight:
        side = VocabularySide(name=target.name, side="gradients", size=128, kept=target.outputs)
        return side.table_VP.mT.to(gradient.dtype) @ gradient
    if target.name.startswith(run.plan.anatomy.embeddings[0]) and target.outputs == 32:
        side = VocabularySide(name=target.name, side="inputs", size=128, kept=target.inputs, counts=COUNTS)
        return gradient.mT @ side.table_VP.to(gradient.dtype)
    return gradient


def check(run, batch, lengths=LENGTHS, vocabulary=SMALL, tolerance=2e-5):
    targets, reasons, found = gradients(run, batch, vocabulary)
    for number, ids in enumerate(documents(lengths)):
        wanted = alone(run, ids)
        for target in targets.values():
            gradient = found.get((target.name, number))
            if gradient is None:
                assert target.experts and not wanted[target.name].any()
                continue
            assert_same(gradient, whole(run, wanted, target), tolerance, f"{target.name} of {number}")
    names = {name for target in targets.values() for name in (target.name, target.bias)} - {None}
    assert not names & set(reasons)
    assert names | set(reasons) == set(wanted) | set(reasons)
    return names, reasons


ARCHITECTURES = ["llama", "qwen2", "qwen3_moe", "mixtral", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_oss"]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "deepseek_v3"])
@pytest.mark.parametrize("form", [packed, rows], ids=["packed", "rows"])
def test_all_parameters_have_the_gradients_that_each_document_has_alone(name, form):
    run = tr.compose(build(name, tied=False).double(), [tr.Full()])
    if form is packed and run.plan.unpackable:
        pytest.skip("not packed")
    _, reasons = check(run, form(documents(LENGTHS)))
    others = {"position", "sink"}
    assert {run.plan.anatomy.parameters[name].role for name in reasons} <= others


TECHNIQUES = {
    "recompute": (tr.Recompute(),),
    "tiles": (tr.TiledBlock(tile=5), tr.TiledLoss(tile=4)),
    "tiles, recomputed": (tr.TiledBlock(tile=5), tr.TiledLoss(tile=4), tr.Recompute()),
    "tiled mlp": (tr.TiledMLP(tile=7),),
}


@pytest.mark.parametrize("techniques", TECHNIQUES, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gemma3"])
def test_recompute_and_tiles_show_every_part_once(name, techniques):
    run = tr.compose(build(name, tied=False), [tr.Full(), *TECHNIQUES[techniques]])
    check(run, packed(documents(LENGTHS)))


def test_a_small_vocabulary_is_not_projected():
    run = tr.compose(build("llama"), [tr.Full()])
    targets, _ = covered(run, vocabulary=256)
    assert not any(target.projected for target in targets.values())
    assert (targets["lm_head.weight"].outputs, targets["model.embed_tokens.weight"].inputs) == (128, 128)
    check(run, packed(documents(LENGTHS)), vocabulary=256)


def test_what_does_not_train_and_what_is_tied_is_left_out_with_a_reason():
    run = tr.compose(
        build("qwen2"), [tr.Full(train=("*.mlp.*", "*.q_proj.*", "model.norm.*"), freeze=("*q_proj.bias",))]
    )
    names, reasons = check(run, packed(documents(LENGTHS)))
    assert "model.norm.weight" in names
    assert (
        reasons["model.layers.0.self_attn.q_proj.bias"] == reasons["model.embed_tokens.weight"] == "it does not train"
    )
    tied = tr.compose(build("gemma2"), [tr.Full()])
    names, reasons = check(tied, packed(documents(LENGTHS)) if not tied.plan.unpackable else rows(documents(LENGTHS)))
    assert reasons == {"model.embed_tokens.weight": "it is both embedding and head"}


def test_the_bias_of_an_adapted_layer_is_a_matrix_of_one_column():
    run = tr.compose(build("qwen2"), [tr.Full(train=("*.bias",)), tr.LoRA(rank=4)])
    targets, _ = covered(run)
    bias = targets["model.layers.0.self_attn.q_proj.bias"]
    assert (bias.outputs, bias.inputs, bias.bias) == (32, 1, None)
    check(run, packed(documents(LENGTHS)))


def sharded(name):
    run = tr.compose(build(name), [tr.Full(), tr.Shard()], mesh=tr.mesh(shard=2))
    return gradients(run, packed(documents(LENGTHS)))[2]


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_gathered_parameters_change_nothing(name):
    run = tr.compose(build(name), [tr.Full()])
    _, _, wanted = gradients(run, packed(documents(LENGTHS)))
    for found in on_ranks(2, sharded, name):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key], 1e-6, str(key))


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3"])
def test_a_frozen_model_in_bfloat16_shows_what_one_that_trains_does(name):
    helping = [tr.Recompute(), tr.TiledLoss(tile=4)]
    batch = packed(documents(LENGTHS))
    targets, _, wanted = gradients(tr.compose(build(name, tied=False, dtype=torch.bfloat16), [tr.Full()]), batch)
    frozen = tr.compose(build(name, tied=False, dtype=torch.bfloat16), helping, frozen=True)
    again, reasons, found = gradients(frozen, batch)
    assert set(again) == set(targets) and not reasons and found.keys() == wanted.keys()
    for key in wanted:
        assert_same(found[key].float(), wanted[key].float(), 2e-2, str(key))
