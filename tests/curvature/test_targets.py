"""What trains has the gradients that autograd gives it, document by document: adapters, experts' adapters, OSFT's Z."""

import pytest
import torch
from torch.nn import functional as F

import treering as tr
from tests.curvature.test_capture import Gathered
from tests.curvature.texts import documents, packed
from tests.same import assert_same
from tests.zoo import build
from treering.curvature import GradientSettings, measure
from treering.curvature.capture import capture
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.targets import TargetPairs, targets_of

LENGTHS = (9, 6, 4)


def alone(run, ids):
    """Gradients of everything that trains, by autograd, of one document, as the optimizer sees them."""
    run.model.eval()
    named = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad]
    logits = run.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    loss = F.cross_entropy(logits.float(), ids[1:], reduction="sum")
    for (_, p), gradient in zip(named, torch.autograd.grad(loss, [p for _, p in named])):
        p.grad = gradient
    for applied in run.plan.applied:  # what the optimizer sees
        if applied.gradients is not None:
            applied.gradients()
    gradients = {n: p.grad.clone() for n, p in named}
    run.model.zero_grad(set_to_none=True)
    return gradients


def started(techniques, name):
    """A run whose adapters are not zero, so that every gradient is something."""
    run = tr.compose(build(name), techniques, statistics=tr.measure(build(name), [packed(documents((60, 60)))]))
    with torch.no_grad():
        for i, (_, p) in enumerate(run.trainable()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return run


def check(run, name):
    targets, _ = targets_of(run.model, run.plan.anatomy, run.plan.maps())
    sizes = {t.name: (*t.lead, t.outputs, t.inputs) for t in targets.values()}
    sink = Gathered(sizes)
    weights = {t.weight for t in targets.values()}
    pairs = TargetPairs(targets.values(), sink)
    with evaluating(run.model), capture(run.model, run.plan.anatomy, weights, pairs) as seen:
        MeasuredModel.of(run, None, None).backward(seen, packed(documents(LENGTHS)), None, "data", 0)
    for number, ids in enumerate(documents(LENGTHS)):
        wanted = alone(run, ids)
        assert set(wanted) == set(targets)
        for target in targets.values():
            found = sink.found[target.name, number]
            gradient = wanted[target.name]
            if target.matrices is not None and target.matrices[0].transposed:
                found = found.mT
            assert_same(found, gradient, 2e-5, target.name)
    return targets


ADAPTERS = {
    "lora": (tr.LoRA(rank=4),),
    "lora in tiles": (tr.LoRA(rank=4), tr.TiledBlock(tile=5), tr.TiledLoss(tile=4), tr.Recompute()),
    "protected": (tr.OSFT(protect="inputs", form="one_sided"),),
    "merged": (tr.OSFT(),),
    "projected": (tr.OSFT(protect="inputs", form="update"),),
    "projected on both sides": (tr.OSFT(protect="weights", ratio=0.4),),
}


@pytest.mark.parametrize("techniques", ADAPTERS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss", "gpt2"])
def test_every_tensor_that_trains_has_its_gradient(name, techniques):
    if "tiles" in techniques and name in ("gpt2", "gpt_oss"):
        pytest.skip("shown by the others")
    check(started(ADAPTERS[techniques], name), name)


def test_factors_of_adapters_are_of_their_own_sizes(tmp_path):
    run = started(ADAPTERS["lora"], "llama")
    batches = [packed(documents(LENGTHS)), packed(documents(LENGTHS, seed=2))]
    found = measure(run, batches, gradients=GradientSettings(kind="ekfac"), to=tmp_path / "m")
    factors = found.gradients
    assert set(factors) == {n for n, _ in run.trainable()} and factors.complete
    A = next(
        one
        for name, one in factors.items()
        if name.endswith("q_proj.treering_lora.A") or ("q_proj" in name and name.endswith(".A"))
    )
    assert A.eigenvalues().shape == (4, 32)
