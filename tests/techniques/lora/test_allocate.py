"""`allocate: greedy`: ranks where they bring back most, at the same number of parameters."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.skips import sharded_codes
from tests.techniques.lora.test_residual_starts import MODELS, QUANTIZE, statistics_of
from tests.toy import gradients, rows
from treering.core.errors import ConfigError
from treering.techniques.lora import reference
from treering.techniques.lora.allocate import MOST, spectrum

RANK = 3


def composed(arch, init="activation", statistics=None, folder=None, allocate="greedy", **more):
    lora = tr.LoRA(rank=RANK, init=init, dtype="float64", allocate=allocate)
    sharded = [tr.Shard()] if torch.distributed.is_initialized() else []
    run = tr.compose(MODELS[arch](), [QUANTIZE, lora, *sharded], statistics=statistics, prepared=folder, **more)
    [lora] = [t for t in run.plan.techniques if isinstance(t, tr.LoRA)]
    return run, lora


def error_of(run, lora, statistics, arch):
    """Σ over matrices of tokens · E‖(W − Q(W) − s B A) x‖²: what the greedy choice makes small."""
    plain, now = dict(MODELS[arch]().named_parameters()), dict(run.plain())
    total = 0.0
    for m in lora.matrices(run.plan.anatomy):
        E, C = m.oriented(plain[m.weight] - now[m.weight]).detach().double(), statistics[m.weight]["inputs"].double()
        total += float(((E @ C * E).sum((-1, -2)) * statistics[m.weight]["tokens"]).sum())
    return total


@pytest.mark.parametrize("arch", MODELS)
def test_less_of_the_error_is_left_with_the_same_number_of_parameters(arch):
    statistics = statistics_of(arch)
    uniform, _ = composed(arch, statistics=statistics, allocate="uniform")
    run, lora = composed(arch, statistics=statistics)
    matrices = lora.matrices(run.plan.anatomy)
    used = sum(sum(lora.of(m).ranks) * (m.outputs + m.inputs) for m in matrices)
    budget = sum(RANK * len(lora.of(m).ranks) * (m.outputs + m.inputs) for m in matrices)
    largest = max(m.outputs + m.inputs for m in matrices)
    assert budget - largest < used <= budget
    assert all(1 <= rank <= min(m.rank, MOST * RANK) for m in matrices for rank in lora.of(m).ranks)
    assert len({rank for m in matrices for rank in lora.of(m).ranks}) > 1
    assert error_of(run, lora, statistics, arch) < 0.97 * error_of(uniform, lora, statistics, arch)
    assert "trained numbers, stored as" in run.explain()


def test_the_spectrum_is_that_of_the_residual_for_measured_inputs():
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 7), (7, 5)):
        R = torch.randn(shape, dtype=torch.float64, generator=generator)
        x = torch.randn(40, shape[1], dtype=torch.float64, generator=generator)
        C = x.T @ x / 40
        A, B = reference.closest_for_inputs(R, C, 2, 1.0)
        left = ((R - B @ A) @ x.T).square().sum() / 40
        torch.testing.assert_close(spectrum(R, C)[2:].sum(), left, rtol=2e-3, atol=0)  # C is damped by 1e-4
        torch.testing.assert_close(spectrum(R, None), torch.linalg.svdvals(R).square())


def test_what_fills_up_a_stack_has_no_gradient_and_stays_zero():
    run, lora = composed("qwen3_moe", init="residual")
    [stack] = [m for m in lora.matrices(run.plan.anatomy) if m.weight.endswith("0.mlp.experts.gate_up_proj")]
    ranks, prefix = lora.of(stack).ranks, f"{stack.module}.{lora.child(stack)}"
    assert len(set(ranks)) > 1
    optimizer = run.optimizer(lr=0.1, weight_decay=0.1)
    found = gradients(run, rows(4))
    for _ in range(2):
        for batch in run.ready([dict(b, count=20) for b in rows(2)]):
            run.loss(batch).backward()
        run.step(optimizer)
    A, B = (run.model.get_parameter(f"{prefix}.{half}") for half in "AB")
    for e, rank in enumerate(ranks):
        for tensor in (A[e, rank:], B[e, :, rank:], found[f"{prefix}.A"][e, rank:], found[f"{prefix}.B"][e, :, rank:]):
            assert not tensor.any()
        assert bool(A[e, :rank].any()) and bool(B[e, :, :rank].any())


def on_two(folder):
    _, lora = composed("qwen3_moe", init="residual", folder=folder)
    return {name: list(ranks) for name, ranks in lora.ranks.items()}


@sharded_codes
def test_ranks_choose_what_one_process_chooses(tmp_path):
    _, lora = composed("qwen3_moe", init="residual")
    wanted = {name: list(ranks) for name, ranks in lora.ranks.items()}
    assert on_ranks(2, on_two, tmp_path) == [wanted, wanted]


def test_ranks_cannot_be_chosen_for_a_start_without_a_residual():
    with pytest.raises(ConfigError, match="allocate is greedy, which chooses ranks for what quantizing leaves out"):
        tr.LoRA(allocate="greedy")
