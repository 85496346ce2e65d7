"""The forward of stacked experts against transformers' own, and grouped products against a loop over experts."""

import copy

import pytest
import torch
from torch import nn

from tests.experts.families import FAMILIES, experts_of, family
from tests.same import assert_all_same, assert_same
from tests.zoo import VOCABULARY
from treering.core.errors import PlanError
from treering.core.module_forward import installed
from treering.experts import products, reference
from treering.experts.grouped_forward import GroupedForward, grouped, release
from treering.experts.routing import route

each = pytest.mark.parametrize("name", FAMILIES)
ROUTINGS = {
    "even": (4, 32, 2),
    "one expert": (1, 5, 1),
    "three, odd": (3, 7, 2),
    "many": (128, 40, 8),
    "one token": (8, 1, 2),
    "no token": (4, 0, 2),
}


def drawn(experts: int, tokens: int, choices: int, *, kind: str = "random") -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    if kind == "all to one":
        return torch.full((tokens, 1), experts - 1)
    weights = torch.ones(experts) if kind == "random" else torch.arange(1, experts + 1).float() ** -2
    if not tokens:
        return torch.empty(0, choices, dtype=torch.long)
    return torch.stack([torch.multinomial(weights, choices, generator=draw) for _ in range(tokens)])


def passes(model, ids):
    """Logits and gradients of everything."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout_computes_what_transformers_computes_bit_for_bit(name, dtype):
    model = family(name, dtype=dtype)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted, gradients = passes(model, ids)
    modules = experts_of(model)
    assert modules
    for fqn, module in modules.items():
        grouped(module, fqn)
    logits, own = passes(model, ids)
    assert torch.equal(logits, wanted)
    assert_all_same(own, gradients, 1e-6 if dtype == torch.float32 else 2e-2)


@each
def test_float64_agrees_with_the_loop_of_transformers(name):
    model = family(name, "eager", torch.float64)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted, gradients = passes(model, ids)
    for fqn, module in experts_of(model).items():
        grouped(module, fqn)
    logits, own = passes(model, ids)
    tolerance = 1e-6 if name == "nemotron_h" else 1e-11  # its own loop adds up in the router's float32
    assert_same(logits, wanted, tolerance)
    wanted_gradients = {key: gradients.get(key, torch.zeros_like(g)) for key, g in own.items()}
    assert_all_same(own, wanted_gradients, 10 * tolerance)


@pytest.mark.parametrize("kind", ["random", "skewed", "all to one"])
@pytest.mark.parametrize("sizes", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("rank", [1, 3, 4, 12, 16])
def test_low_rank_products_and_gradients_are_those_of_a_loop(sizes, kind, rank):
    experts, tokens, choices = sizes
    torch.manual_seed(0)  # with other numbers a product of one token may happen to be almost zero
    routing = route(drawn(experts, tokens, choices, kind=kind), experts)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x = torch.randn(tokens, 24).to(dtype)[routing.tokens].requires_grad_()
        A = torch.randn(experts, rank, 24).to(dtype).requires_grad_()
        B = torch.randn(experts, 20, rank).to(dtype).requires_grad_()
        y = products.low_rank(x, A, B, routing.offsets, 0.5)
        z = reference.low_rank(x, A, B, routing.offsets, 0.5)
        assert_same(y, z, tolerance)
        weight = torch.randn(y.shape).to(dtype)
        ours = torch.autograd.grad((y * weight).sum(), (x, A, B))
        theirs = torch.autograd.grad((z * weight).sum(), (x, A, B), allow_unused=True, materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, tolerance)


def test_a_sum_may_be_the_loss():
    """`out.sum().backward()` gives a gradient whose strides are 0, which grouped_mm itself refuses."""
    routing = route(drawn(4, 16, 2), 4)
    x = torch.randn(16, 32)[routing.tokens].requires_grad_()
    W = torch.randn(4, 48, 32, requires_grad=True)
    products.stack_product(x, W, routing.offsets).sum().backward()
    ones = torch.ones(32, 48)
    assert_same(W.grad, reference.rows_by_rows(ones, x.detach(), routing.offsets), 1e-6)


def test_float32_factors_of_a_bfloat16_model_compute_in_float32():
    routing = route(drawn(4, 16, 2), 4)
    x = torch.randn(16, 32)[routing.tokens].bfloat16()
    A, B = torch.randn(4, 3, 32), torch.randn(4, 48, 3)
    y = products.low_rank(x, A, B, routing.offsets, 1.0)
    assert y.dtype == torch.bfloat16
    assert_same(y, reference.low_rank(x.float(), A, B, routing.offsets, 1.0), 2**-8)  # rounded once


def test_only_the_input_and_the_narrow_product_are_saved():
    routing = route(drawn(8, 64, 2), 8)
    x = torch.randn(128, 256, requires_grad=True)
    A, B = torch.randn(8, 4, 256, requires_grad=True), torch.randn(8, 512, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        products.low_rank(x, A, B, routing.offsets, 1.0)
    sizes = [t.numel() for t in saved if t.data_ptr() not in {p.data_ptr() for p in (x, A, B, routing.offsets)}]
    assert sizes == [128 * 4]


def test_rows_without_a_gradient_cost_nothing_for_the_weight():
    """A frozen stack keeps no rows for the backward."""
    routing = route(drawn(4, 16, 2), 4)
    x, W = torch.randn(32, 32, requires_grad=True), torch.randn(4, 48, 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        products.stack_product(x, W, routing.offsets)
    assert x.data_ptr() not in {t.data_ptr() for t in saved}


def test_routing():
    routing = route(torch.tensor([[2, 0], [2, 3], [0, 3]]), 5)
    assert routing.experts.tolist() == [0, 0, 2, 2, 3, 3] and routing.tokens.tolist() == [0, 2, 0, 1, 1, 2]
    assert routing.offsets.tolist() == [2, 2, 4, 6, 6] and routing.offsets.dtype == torch.int32
    assert routing.combine(torch.arange(6.0)[:, None]).flatten().tolist() == [0 + 2, 3 + 4, 1 + 5]


def test_the_last_user_gives_the_modules_own_forward_back():
    model = family("mixtral")
    (fqn, module), *_ = experts_of(model).items()
    first, second = grouped(module, fqn), grouped(module, fqn)
    assert first is second
    release(first)()
    assert isinstance(installed(module), GroupedForward)
    undo = release(second)
    undo()
    undo()
    assert "forward" not in module.__dict__


def test_a_copy_computes_with_its_own_weights():
    model = family("qwen3_moe")
    for fqn, module in experts_of(model).items():
        grouped(module, fqn)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in experts_of(other).values():
            module.down_proj.zero_()
    ids = torch.arange(8)[None]
    assert not torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(installed(module).module is module for module in experts_of(other).values())


def test_modules_without_the_interface_are_refused_by_name():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(PlanError, match=r"model\.layers\.0\.experts: Stacked does not have transformers' experts"):
        grouped(Stacked(), "model.layers.0.experts")
    model = family("mixtral")
    module = next(iter(experts_of(model).values()))
    module.forward = lambda *args: None
    with pytest.raises(PlanError, match="was replaced by function"):
        grouped(module, "x")
