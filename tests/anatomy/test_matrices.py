"""Linear layers and experts as matrices [outputs, inputs]: their names, their shapes, and where they lie."""

import pytest
import torch
from torch import nn

from tests.same import assert_same
from tests.zoo import ARCHITECTURES, build
from treering.anatomy import examine
from treering.anatomy.matrices import Matrix, all_linear, matrices

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_and_every_stack_is_a_matrix_once_and_in_the_model_s_order(name):
    model = build(name)
    anatomy = examine(model)
    each = matrices(anatomy)
    tied = anatomy.head.tied_to
    wanted = {linear.weight for linear in anatomy.linears} - {tied} | {s for e in anatomy.experts for s in e.stacked}
    assert [m.weight for m in each] == [n for n, _ in model.named_parameters() if n in wanted]
    for matrix in each:
        parameter = model.get_parameter(matrix.weight)
        assert tuple(parameter.shape) == matrix.shape and matrix.numel == parameter.numel()
        assert matrix.weight == f"{matrix.module}.{matrix.leaf}"
        assert matrix.view(parameter).shape == (*matrix.lead, matrix.outputs, matrix.inputs)
        assert matrix.oriented(matrix.view(parameter)).shape == parameter.shape
        assert matrix.input_moment == (*matrix.lead, matrix.inputs, matrix.inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_linear_layer_computes_with_its_matrix(name):
    model = build(name, dtype=torch.float64)
    for matrix in matrices(examine(model)):
        layer = model.get_submodule(matrix.module)
        x = torch.randn(3, matrix.inputs, dtype=torch.float64)
        y = x @ matrix.view(layer.weight).T
        assert_same(layer(x), y if layer.bias is None else y + layer.bias, 1e-12)
        assert matrix.each() == (matrix,) and matrix.name == matrix.weight


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_computes_with_its_matrix(name):
    """One token that the router is told to send to one expert: the output is that expert's, from its two matrices."""
    model = build(name, dtype=torch.float64)
    for experts in examine(model).experts:
        module = model.get_submodule(experts.fqn)
        first, second = (m for m in matrices(examine(model)) if m.module == experts.fqn)
        x = torch.randn(1, first.inputs, dtype=torch.float64)
        for expert in range(experts.number):
            up, down = first.each()[expert], second.each()[expert]
            y = x @ up.view(getattr(module, first.leaf)).T
            y = y + module.gate_up_proj_bias[expert] if experts.biases else y
            gate, linear = (y[:, ::2], y[:, 1::2]) if experts.interleaved else y.chunk(2, -1)
            if name == "gpt_oss":
                gate, linear = gate.clamp(max=7.0), linear.clamp(-7.0, 7.0)
                inner = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                inner = nn.functional.silu(gate) * linear
            wanted = inner @ down.view(getattr(module, second.leaf)).T
            wanted = wanted + module.down_proj_bias[expert] if experts.biases else wanted
            routes, shares = torch.tensor([[expert]]), torch.ones(1, 1, dtype=torch.float64)
            assert_same(module(x, routes, shares), wanted, 1e-12, f"{experts.fqn} {expert}")


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_is_a_view_of_the_stack_and_is_written_where_it_lies(name):
    model = build(name)
    stacks = [m for m in matrices(examine(model)) if m.role == "experts"]
    assert stacks and {m.transposed for m in stacks} == {name == "gpt_oss"}
    names = [one.name for m in matrices(examine(model)) for one in m.each()]
    assert len(set(names)) == len(names)
    for stack in stacks:
        parameter = model.get_parameter(stack.weight).detach()
        before = parameter.clone()
        one = stack.each()[2]
        assert (one.expert, one.lead, one.name) == (2, (), f"{stack.weight}[2]")
        assert one.shape == tuple(parameter.shape[1:]) and one.numel * stack.experts == stack.numel
        assert one.view(parameter).data_ptr() == parameter[2].data_ptr(), "a view, not a copy"
        assert torch.equal(one.view(parameter), stack.view(parameter)[2])
        value = torch.randn(one.outputs, one.inputs, dtype=torch.float64)
        one.write(parameter, value)
        assert torch.equal(one.view(parameter), value.float())
        others = [i for i in range(stack.experts) if i != 2]
        assert torch.equal(parameter[others], before[others]), "no other expert was written to"


def test_all_linear_means_attention_mlp_and_experts_of_the_blocks():
    anatomy = examine(build("deepseek_v3"))
    assert {m.role for m in all_linear(anatomy)} == {"attention", "mlp", "experts"}
    assert all(m.block is not None for m in all_linear(anatomy))
    assert not any("gate." in m.weight for m in all_linear(anatomy)), "routers are not adapted"


def test_a_tied_head_is_not_a_matrix_and_an_untied_one_is():
    for tied in (True, False):
        anatomy = examine(build("llama", tied=tied))
        assert ("lm_head.weight" in {m.weight for m in matrices(anatomy)}) == (not tied)
        assert "model.embed_tokens.weight" not in {m.weight for m in matrices(anatomy)}


def test_writing_casts_to_the_parameter_s_dtype():
    matrix = Matrix(
        weight="w", module="", outputs=2, inputs=3, experts=None, transposed=True, block=0, role="mlp"
    )  # fmt: skip
    parameter = torch.zeros(3, 2, dtype=torch.bfloat16)
    matrix.write(parameter, torch.arange(6.0).view(2, 3))
    assert torch.equal(parameter, torch.arange(6.0).view(2, 3).T.bfloat16())
