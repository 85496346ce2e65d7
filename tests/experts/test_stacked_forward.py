"""Weights shown to a module of stacked experts for one forward, and the products that it computes with each expert."""

import copy

import pytest
import torch
from torch import nn

import treering as tr
from tests.same import assert_same
from tests.zoo import build
from treering.anatomy import examine
from treering.anatomy.matrices import of_experts
from treering.core.module_forward import install
from treering.experts.stacked_forward import ShownWeights, watch_products
from treering.technique import recomputing

NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]
ROUTES = torch.tensor([[0, 2], [2, 3], [2, 0]])  # no token reaches expert 1


def first_experts(name):
    model = build(name, dtype=torch.float64)
    anatomy = examine(model)
    experts = anatomy.experts[0]
    return model.get_submodule(experts.fqn), of_experts(anatomy, experts)


def inputs(stacks):
    torch.manual_seed(0)
    return torch.randn(3, stacks[0].inputs, dtype=torch.float64), ROUTES, torch.rand(3, 2, dtype=torch.float64)


class Halves(nn.Module):
    """A weight held as two summands."""

    def __init__(self, weight):
        super().__init__()
        self.a, self.b = nn.Parameter(weight * 0.25), nn.Parameter(weight * 0.75)

    def forward(self, hidden):
        return hidden, self.a + self.b


def replaced(module, stacks):
    children = {}
    for stack in stacks:
        weight = getattr(module, stack.leaf).detach()
        delattr(module, stack.leaf)
        children[stack.leaf] = Halves(weight)
        module.add_module(f"halves_{stack.leaf}", children[stack.leaf])
    return install(ShownWeights(module, children))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_computes_with_weights_that_it_is_shown_and_their_gradients_arrive(name):
    module, stacks = first_experts(name)
    x, routes, shares = inputs(stacks)
    wanted = module(x, routes, shares)
    wanted.sum().backward()
    gradients = {stack.leaf: getattr(module, stack.leaf).grad for stack in stacks}
    replaced(module, stacks)
    result = module(x, routes, shares)
    assert_same(result, wanted, 1e-12)
    result.sum().backward()
    for leaf, gradient in gradients.items():
        assert_same(module.get_submodule(f"halves_{leaf}").a.grad, gradient, 1e-12, leaf)
        assert not hasattr(module, leaf), "nothing stays after the forward"


def test_nothing_is_left_on_the_module_after_an_error_and_a_copy_uses_its_own_weights():
    module, stacks = first_experts("mixtral")
    x, routes, shares = inputs(stacks)
    replaced(module, stacks)
    with pytest.raises(RuntimeError):
        module(x, routes + 9, shares)
    assert not any(hasattr(module, stack.leaf) for stack in stacks)
    before, other = module(x, routes, shares), copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(module(x, routes, shares), before, 0.0)
    assert not other(x, routes, shares).any()


class Listing:
    def __init__(self):
        self.products = []

    def take(self, product):
        self.products.append(product)

    def unknown(self, weight):
        return tr.PlanError(f"{weight} is not understood")


@pytest.mark.parametrize("name", NAMES)
def test_each_product_is_reported_with_its_expert_and_its_tokens(name):
    module, stacks = first_experts(name)
    x, routes, shares = inputs(stacks)
    forward, config, plain = vars(module).get("forward"), module.config, module(x, routes, shares)
    listing = Listing()
    undo = watch_products(module, stacks, listing)
    assert_same(module(x, routes, shares), plain, 1e-12)
    with recomputing("recompute"):
        module(x, routes, shares)  # a second pass is not reported
    undo()
    assert [(p.matrix.leaf, p.matrix.expert) for p in listing.products] == [
        (stack.leaf, expert) for expert in (0, 2, 3) for stack in stacks
    ]
    for product in listing.products:
        tokens = [t for t in range(3) if product.matrix.expert in routes[t].tolist()]
        assert product.hidden is x and sorted(product.tokens.tolist()) == tokens
        assert product.x.shape == (len(tokens), product.matrix.inputs)
        if product.matrix.leaf == stacks[0].leaf:
            assert torch.equal(product.x, x[product.tokens])
    assert vars(module).get("forward") is forward and module.config is config
    count = len(listing.products)
    module(x, routes, shares)
    assert len(listing.products) == count


def test_a_stack_that_is_used_as_a_whole_or_not_at_all_is_refused():
    module, stacks = first_experts("mixtral")
    x, routes, shares = inputs(stacks)
    for forward in (lambda x, *_: torch.einsum("tm,enm->tn", x, module.gate_up_proj), lambda x, *_: x):
        module.forward = forward
        undo = watch_products(module, stacks, Listing())
        with pytest.raises(tr.PlanError, match="not understood"):
            module(x, routes, shares)
        undo()
        assert module.forward is forward
