"""Where techniques say that inputs and output gradients are seen, they make up the gradient of what trains: Σ g aᵀ."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.toy import rows
from tests.zoo import build
from treering.core.sharded import gather

OSFT = {"protect": "weights", "ratio": 0.4}
CASES = {
    "full": ("llama", [tr.Full()]),
    "transposed": ("gpt2", [tr.Full()]),
    "lora": ("llama", [tr.LoRA(rank=3, alpha=7.0, dtype="float64")]),
    "pissa": ("gpt2", [tr.LoRA(rank=3, init="pissa", dtype="float64")]),
    "two adapters": ("llama", [tr.LoRA(rank=3, dtype="float64"), tr.LoRA(name="two", rank=2, dtype="float64")]),
    "osft, one-sided": ("llama", [tr.OSFT(**OSFT, form="one_sided")]),
    "osft, core": ("llama", [tr.OSFT(**OSFT, form="core")]),
}


def watched(run):
    """The gradients that follow from what hooks see at the places of the maps, and those of the parameters."""
    matrices = [one for applied in run.plan.applied for several in applied.maps.values() for one in several]
    sums = {}

    def watch(one):
        module = run.model.get_submodule(one.module)

        def hook(module, args, output):
            a = args[0].detach().flatten(0, -2)

            def arrived(gradient):
                g = gradient.flatten(0, -2)
                seen = one.outputs(g) if one.outputs else g, one.inputs(a) if one.inputs else a
                with torch.no_grad():
                    G = seen[0].T @ seen[1]
                    sums[one.name] = sums.get(one.name, 0) + (G.T if one.transposed else G)

            output.register_hook(arrived)

        module.register_forward_hook(hook)

    for one in matrices:
        watch(one)
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):  # the second step starts where no adapter is zero
        sums.clear()
        batches = run.ready([{**b, "count": 20} for b in rows(3)])
        for batch in batches:
            run.loss(batch).backward()
        gradients = {name: p.grad.detach().clone() for name, p in run.trainable() if p.grad is not None}
        moments = {name: value.clone() for name, value in sums.items()}
        run.step(optimizer)
    return moments, gradients


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_made_of_inputs_and_output_gradients(case):
    arch, techniques = CASES[case]
    run = tr.compose(build(arch, dtype=torch.float64), techniques)
    moments, gradients = watched(run)
    linears = {linear.weight for linear in run.plan.anatomy.linears}
    wanted = {n: g for n, g in gradients.items() if n not in run.plan.plain or n in linears}
    if arch == "gpt2":
        wanted.pop(run.plan.anatomy.head.tied_to, None)
    assert_all_same(moments, wanted, 1e-12)
    assert all(float(gradient.abs().max()) > 0 for gradient in wanted.values())


def sharded():
    run = tr.compose(
        build("llama", dtype=torch.float64), [tr.LoRA(rank=3, dtype="float64"), tr.Shard()], mesh=tr.mesh()
    )
    moments, gradients = watched(run)
    for name, value in moments.items():
        torch.distributed.all_reduce(value)
        assert_same(value, gather(gradients[name]), 1e-12, name)
    return len(moments)


def test_the_sum_over_ranks_is_the_gradient_of_the_sharded_parameter():
    assert on_ranks(2, sharded) == [28, 28]


def test_every_expert_of_a_stack_is_a_matrix_of_its_own():
    run = tr.compose(build("qwen3_moe"), [tr.Full(train=("*experts*",))])
    (applied,) = run.plan.applied
    for name, matrices in applied.maps.items():
        number = run.model.get_parameter(name).shape[0]
        assert [one.expert for one in matrices] == list(range(number))
        assert {one.name for one in matrices} == {name}
        assert all(name.startswith(f"{one.module}.") for one in matrices)
    assert set(applied.maps) == {name for experts in run.plan.anatomy.experts for name in experts.stacked}
