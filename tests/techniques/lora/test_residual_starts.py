"""Starts from what quantizing leaves out: the best approximation of it, for all directions or for measured inputs."""

import pytest
import torch

import treering as tr
from tests.experts.families import family
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.skips import sharded_codes
from tests.toy import rows
from tests.zoo import build
from treering.core.errors import PlanError
from treering.core.sharded import gather

QUANTIZE = tr.Quantize(format="int3", group=8)
TARGETS = ("q_proj", "down_proj")
MODELS = {
    "llama": lambda: build("llama"),
    "qwen3_moe": lambda: family("qwen3_moe"),
    "gpt_oss": lambda: family("gpt_oss"),
}


def statistics_of(arch):
    return tr.measure(MODELS[arch](), [{"input_ids": batch["input_ids"]} for batch in rows(6)])


def started(arch, init, rank=3, folder=None, **more):
    lora = tr.LoRA(rank=rank, alpha=2.0, targets=TARGETS, init=init, dtype="float64")
    techniques = [QUANTIZE, lora, *([tr.Shard()] if torch.distributed.is_initialized() else [])]
    return tr.compose(MODELS[arch](), techniques, prepared=folder, **more)


def errors(arch, init, **more):
    """W − (Q(W) + s B A) of each adapted matrix, […, N, M], by weight."""
    run = started(arch, init, **more)
    plain = dict(MODELS[arch]().named_parameters())
    now = dict(run.plain())
    return {m.weight: m.oriented(plain[m.weight] - now[m.weight]).detach().double() for m in adapted(run)}, run


def adapted(run):
    [lora] = [t for t in run.plan.techniques if isinstance(t, tr.LoRA)]
    return lora.matrices(run.plan.anatomy)


@pytest.mark.parametrize("arch", MODELS)
def test_the_residual_start_is_the_best_approximation_of_every_matrix(arch):
    zero, _ = errors(arch, "kaiming_zeros")
    found, _ = errors(arch, "residual")
    for weight, error in found.items():
        best = torch.linalg.svdvals(zero[weight])[..., 3:].square().sum(-1).sqrt()
        assert_same(error.flatten(-2).norm(dim=-1), best, 1e-5, weight)
        assert bool((best < zero[weight].flatten(-2).norm(dim=-1)).all())


@pytest.mark.parametrize("arch", MODELS)
def test_the_activation_start_has_the_least_error_for_measured_inputs(arch):
    statistics = statistics_of(arch)
    residual, _ = errors(arch, "residual")
    found, _ = errors(arch, "activation", statistics=statistics)
    for weight, error in found.items():
        C = statistics[weight]["inputs"].double()

        def weighted(E, C=C):
            return (E @ C * E).sum((-1, -2))

        reached = C.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        ours, plain = weighted(error), weighted(residual[weight])
        assert bool((ours <= plain * (1 + 1e-3))[reached].all()) if ours.ndim else ours <= plain * (1 + 1e-3)
        assert float(ours.sum()) < 0.9 * float(plain.sum()), weight


def test_experts_that_no_token_reached_start_from_the_plain_residual_and_are_reported():
    statistics = {name: dict(one) for name, one in statistics_of("qwen3_moe").items()}
    weight = "model.layers.0.mlp.experts.down_proj"
    moments, tokens = statistics[weight]["inputs"].clone(), statistics[weight]["tokens"].clone()
    moments[2], tokens[2] = 0, 0
    statistics[weight] = {"inputs": moments, "tokens": tokens}
    found, run = errors("qwen3_moe", "activation", statistics=statistics)
    residual, _ = errors("qwen3_moe", "residual")
    assert_same(found[weight][2], residual[weight][2], 1e-6)
    assert any("reached 1 of the 4 matrices" in text for a in run.plan.applied for text in a.warnings)


def on_two(arch, folder):
    run = started(arch, "residual", folder=folder)
    return {name: gather(p) for name, p in run.trainable()}


@sharded_codes
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_ranks_start_where_one_process_starts(arch, tmp_path):
    wanted = {name: p.detach() for name, p in started(arch, "residual").trainable()}
    for found in on_ranks(2, on_two, arch, tmp_path):
        for name in wanted:
            if name.endswith(".B"):  # together: a singular vector has no sign of its own
                A = name.replace(".B", ".A")
                assert_same(found[name] @ found[A], wanted[name] @ wanted[A], 1e-9, name)


def test_without_a_quantizer_adapters_start_at_zero_with_a_warning():
    run = tr.compose(build("llama"), [tr.LoRA(rank=3, init="residual", targets=TARGETS)])
    assert all(float(p.detach().abs().sum()) == 0 for name, p in run.trainable() if name.endswith(".B"))
    assert any("4 of 4 weights are not quantized" in text for a in run.plan.applied for text in a.warnings)


def test_what_cannot_start_is_refused():
    with pytest.raises(PlanError, match="no statistics hold them; measure this model"):
        started("llama", "activation")
    wrong = {name: {"inputs": torch.eye(5)} for name in statistics_of("llama")}
    with pytest.raises(PlanError, match="they are of another model"):
        started("llama", "activation", statistics=wrong)


def test_such_an_adapter_is_not_exported_alone(tmp_path):
    run = started("llama", "residual")
    with pytest.raises(PlanError, match="fits the quantized base"):
        run.export(tmp_path / "a", adapter="default")
    run.export(tmp_path / "dense")
