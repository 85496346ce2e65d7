"""The pairs of a backward give each document's gradient: autograd's of that document alone, whatever surrounds it."""

import pytest
import torch

import treering as tr
from tests.curvature.texts import documents, packed, rows
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build
from treering.anatomy import examine
from treering.curvature.capture import capturable, capture
from treering.curvature.gradient_terms import DocumentGradients
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.reference import document_gradients
from treering.techniques.tiling.groups import KNOWS_ELSEWHERE

LENGTHS = (12, 7, 5, 9)


class Gathered:
    """A sink that keeps every document's gradient, E × N × M of stacks."""

    def __init__(self, sizes):
        self.sizes, self.found, self.calls = sizes, {}, 0
        self._documents = DocumentGradients()

    def take(self, pair):
        self.calls += 1
        for segment, gradient in self._documents.of(pair, pair.a_RM, pair.g_RN):
            key = (pair.weight, segment.document)
            if pair.experts is None:
                assert key not in self.found, "a document is given twice"
                self.found[key] = gradient
                continue
            stack = self.found.setdefault(key, torch.zeros(self.sizes[pair.weight], dtype=gradient.dtype))
            assert not stack[segment.expert].any(), "a document of an expert is given twice"
            stack[segment.expert] = gradient


def observed(run, batch, weights, sizes):
    sink = Gathered(sizes)
    subject = MeasuredModel.of(run, None, None)
    real = batch.get("attention_mask")
    with evaluating(run.model), capture(run.model, run.plan.anatomy, weights, sink) as seen:
        subject.backward(seen, batch, real, "data", 0)
    assert all(p.grad is None for p in run.model.parameters())
    return sink


def wanted_and_weights(name, dtype, trained=None):
    model = build(name).to(dtype)
    anatomy = examine(model)
    possible, _ = capturable(model, anatomy)
    model.eval()
    each = [document_gradients(model, anatomy, d, trained and trained(d)) for d in documents(LENGTHS)]
    sizes = {w: (*m.lead, m.outputs, m.inputs) for w, m in possible.items()}
    return each, possible, sizes


def compare(name, techniques=(), form="packed", dtype=torch.float64, tolerance=None, labels=False):
    tolerance = tolerance or (1e-10 if name == "gpt2" else 2e-6)  # norms and rotations of others are in float32
    masked = (lambda d: torch.arange(len(d)) >= len(d) // 2) if labels else None
    each, possible, sizes = wanted_and_weights(name, dtype, masked)
    run = tr.compose(build(name).to(dtype), [tr.Full(), *techniques])
    batch = (packed if form == "packed" else rows)(documents(LENGTHS))
    if labels:
        batch["labels"] = batch["input_ids"].clone()
        starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
        for i, length in enumerate(LENGTHS):
            row, at = (0, starts[i]) if form == "packed" else (i, 0)
            batch["labels"][row, at : at + length // 2] = -100
        if form != "packed":
            batch["labels"][batch["attention_mask"] == 0] = -100
    sink = observed(run, batch, set(possible), sizes)
    for weight in possible:
        for number, gradients in enumerate(each):
            assert_same(sink.found[weight, number], gradients[weight], tolerance, f"{weight} of {number}")
    return sink


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("form", ["packed", "rows"])
def test_documents_have_the_gradients_that_each_has_alone(name, form):
    if form == "packed" and tr.compose(build(name), [tr.Full()]).plan.unpackable:
        pytest.skip("not packed")
    compare(name, form=form)


TECHNIQUES = {
    "recompute": (tr.Recompute(),),
    "tiled blocks": (tr.TiledBlock(tile=5),),
    "tiled loss": (tr.TiledLoss(tile=4),),
    "tiled mlp": (tr.TiledMLP(tile=7),),
    "all": (tr.TiledBlock(tile=5), tr.TiledLoss(tile=4), tr.Recompute()),
}


@pytest.mark.parametrize("techniques", TECHNIQUES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_recompute_and_tiles_show_each_row_once(name, techniques):
    compare(name, TECHNIQUES[techniques])


@pytest.mark.parametrize("form", ["packed", "rows"])
@pytest.mark.parametrize("techniques", [(), TECHNIQUES["all"]], ids=["plain", "all"])
def test_only_trained_tokens_have_a_loss_and_all_before_them_a_gradient(form, techniques):
    if form == "rows" and techniques:
        pytest.skip("one form")
    compare("llama", techniques, form=form, labels=True)


def test_adapters_that_train_show_the_pairs_of_their_base_weight():
    lora = tr.LoRA(rank=4)
    base = compare("llama", dtype=torch.float32, tolerance=1e-5)
    run = tr.compose(build("llama"), [lora])
    sink = observed(run, packed(documents(LENGTHS)), {w for w, _ in base.found}, {})
    for key, gradient in base.found.items():
        assert_same(sink.found[key], gradient, 1e-5, str(key))


def sharded(name):
    run = tr.compose(build(name), [tr.Full(), tr.Shard()], mesh=tr.mesh(shard=2))
    weights, sizes = zip(
        *((w, (*m.lead, m.outputs, m.inputs)) for w, m in capturable(run.model, run.plan.anatomy)[0].items())
    )
    return observed(run, packed(documents(LENGTHS)), set(weights), dict(zip(weights, sizes))).found


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_gathered_parameters_change_nothing(name):
    each, possible, _ = wanted_and_weights(name, torch.float32)
    for found in on_ranks(2, sharded, name):
        for weight in possible:
            for number, gradients in enumerate(each):
                assert_same(found[weight, number], gradients[weight], 1e-5, weight)


@pytest.mark.skipif(not KNOWS_ELSEWHERE, reason="transformers before 5.18 has no groups of experts")
def test_experts_in_groups_are_refused():
    run = tr.compose(build("qwen3_moe"), [tr.Full(), tr.TiledMLP(tile=7, experts="groups")])
    weights = set(capturable(run.model, run.plan.anatomy)[0])
    with pytest.raises(tr.PlanError, match="set experts to tokens"):
        observed(run, packed(documents(LENGTHS)), weights, {})
