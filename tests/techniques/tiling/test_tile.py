"""The mechanism: any token-wise function in any tiling has the values and gradients it has without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.same import assert_same
from treering.core.errors import PlanError
from treering.core.seeds import generator
from treering.techniques.tiling import reference
from treering.techniques.tiling.tile import bounds, tile


def random(*shape, key="x", dtype=torch.float32, grad=True):
    return torch.randn(shape, generator=generator(0, key, *shape)).to(dtype).requires_grad_(grad)


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate) * (x @ up)) @ down


def weights(hidden=16, inner=24, dtype=torch.float32):
    shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    return [random(*shape, key=name, dtype=dtype) for name, shape in shapes.items()]


def gradients(fn, x, params, given):
    leaves = [t for t in (x, *params) if t.requires_grad]
    y = fn(x, *params)
    return [y.detach(), *torch.autograd.grad(y, leaves, given.to(y.dtype))]


def in_tiles(size, **how):
    return lambda x, *params: tile(swiglu, x, params=params, size=size, **how)


@pytest.mark.parametrize("shape", [(50, 16), (3, 17, 16), (1, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tile_is_bitwise_the_function(shape, dtype):
    x, params, given = random(*shape, dtype=dtype), weights(dtype=dtype), random(*shape, key="g", dtype=dtype)
    wanted = gradients(swiglu, x, params, given)
    for a, b in zip(gradients(in_tiles(1000, dims=len(shape) - 1), x, params, given), wanted):
        assert torch.equal(a, b)


@settings(max_examples=25)
@given(rows=st.integers(1, 3), tokens=st.integers(1, 40), size=st.integers(1, 50))
def test_any_tiling_agrees_to_a_millionth(rows, tokens, size):
    x, params, given = random(rows, tokens, 16), weights(), random(rows, tokens, 16, key="g")
    wanted = gradients(swiglu, x, params, given)
    for a, b in zip(gradients(in_tiles(size, dims=2), x, params, given), wanted):
        assert_same(a, b, 1e-6)


def test_the_reference_agrees_in_float64():
    x, params, given = random(23, 16, dtype=torch.float64), weights(dtype=torch.float64), random(23, 16, key="g")
    cuts = [stop - start for start, stop in bounds(23, 6)]
    wanted = gradients(lambda x, *w: reference.tiled(swiglu, [x], w, cuts), x, params, given)
    for a, b in zip(gradients(in_tiles(6), x, params, given), wanted):
        assert_same(a, b, 1e-14)


def test_gradients_are_those_of_finite_differences():
    x, params = random(5, 4, dtype=torch.float64), weights(4, 3, torch.float64)
    assert torch.autograd.gradcheck(in_tiles(2), (x, *params))
    total = lambda x, *w: tile(lambda x, *w: swiglu(x, *w).square().sum(), x, params=w, size=2, out="sum")  # noqa: E731
    assert torch.autograd.gradcheck(total, (x, *params))


@pytest.mark.parametrize("tiles", [4, 64, 1024])
def test_rounding_of_a_weight_gradient_does_not_grow_with_the_number_of_tiles(tiles):
    x, given = random(4096, 16, dtype=torch.bfloat16), random(4096, 16, key="g", dtype=torch.bfloat16)
    params = weights(dtype=torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, *params)]
    truth = gradients(swiglu, wide[0], wide[1:], given)[2:]
    plain = gradients(swiglu, x, params, given)[2:]
    error = lambda found: sum(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth))  # noqa: E731
    ours = error(gradients(in_tiles(4096 // tiles), x, params, given)[2:])
    assert ours <= 1.15 * error(plain)
    if tiles == 1024:
        assert error(gradients(in_tiles(4096 // tiles, wide=False), x, params, given)[2:]) > 2 * ours


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_weights_and_inputs_without_gradient_leave_the_others_alone(frozen, grad):
    x, params, given = random(20, 16, grad=grad), weights(), random(20, 16, key="g")
    for i in frozen:
        params[i].requires_grad_(False)
    if not grad and len(frozen) == 3:
        assert not in_tiles(7)(x, *params).requires_grad
        return
    for a, b in zip(gradients(in_tiles(7), x, params, given), gradients(swiglu, x, params, given)):
        assert_same(a, b, 1e-6)


def test_micro_batches_and_two_uses_of_one_weight_add_up():
    x, params = random(20, 16), weights()
    twice = lambda f: f(f(x, *params), *params).square().sum() + f(x, *params).sum()  # noqa: E731
    found = {}
    for name, f in (("plain", swiglu), ("tiled", in_tiles(6))):
        for t in (x, *params):
            t.grad = None
        twice(f).backward()
        twice(f).backward()
        found[name] = [t.grad for t in (x, *params)]
    for a, b in zip(found["tiled"], found["plain"]):
        assert_same(a, b, 2e-6)


def test_a_graph_that_is_kept_can_be_used_twice():
    x, params = random(20, 16), weights()
    for out in ("cat", "sum"):
        fn = swiglu if out == "cat" else lambda x, *w: swiglu(x, *w).sum()
        y = tile(fn, x, params=params, size=6, out=out).sum()
        first = torch.autograd.grad(y, [x, *params], retain_graph=True)
        second = torch.autograd.grad(3 * y, [x, *params])
        for a, b in zip(first, second):
            assert_same(b, 3 * a, 1e-6)


def test_what_comes_in_is_not_rounded_to_the_dtype_of_the_gradients():
    x, w = random(64, 32, dtype=torch.bfloat16), random(32, 16, dtype=torch.bfloat16, key="w")
    y = tile(lambda a, b: (a @ b).float().square().sum(), x, params=[w], size=16, out="sum")
    unscaled = torch.autograd.grad(y, [x, w], retain_graph=True)
    for found, gradient in zip(torch.autograd.grad(y / 901, [x, w]), unscaled):
        assert torch.equal(found, (gradient.float() / 901).bfloat16())


def test_a_sum_is_scaled_by_what_comes_in_for_tokens_and_weights_alike():
    x, params = random(20, 16), weights()
    y = tile(lambda x, *w: swiglu(x, *w).square().sum(), x, params=params, size=6, out="sum")
    wanted = torch.autograd.grad(0.25 * swiglu(x, *params).square().sum(), [x, *params])
    for a, b in zip(torch.autograd.grad(0.25 * y, [x, *params]), wanted):
        assert_same(a, b, 1e-6)


def test_gradients_that_autograd_shares_between_inputs_are_not_added_into_each_other():
    x, a, b = random(9, 4), random(4, key="a"), random(4, key="b")
    y = tile(lambda x, a, b: x + (a + b), x, params=(a, b), size=2)
    for found in torch.autograd.grad(y.sum(), [a, b]):
        assert torch.equal(found, torch.full((4,), 9.0))


def test_several_outputs_and_integer_tokens():
    x, index = random(11, 4), torch.arange(11)
    table, unused = random(20, 4, key="t"), random(3, key="unused")
    body = lambda x, i, t, u: (x * t[i], i + 1, x.sum(-1))  # noqa: E731
    found, numbers, sums = tile(body, x, index, params=(table, unused), size=4)
    assert torch.equal(numbers, index + 1) and not numbers.requires_grad
    wanted = body(x, index, table, unused)
    for f, w in ((found.square().sum(), wanted[0].square().sum()), (sums.square().sum(), wanted[2].square().sum())):
        some = torch.autograd.grad(f, [x, table, unused], retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(w, [x, table, unused], retain_graph=True, allow_unused=True)
        for a, b in zip(some, other):
            assert (a is None and b is None) or torch.allclose(a, b)


def test_no_token_at_all_is_no_gradient():
    x, params = random(0, 16), weights()
    y = in_tiles(4)(x, *params)
    assert y.shape == (0, 16)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), params))


def test_hooks_of_a_weight_run_once_however_many_tiles_there_are():
    x, params = random(20, 16), weights()
    seen = []
    params[0].register_hook(lambda g: seen.append("tensor") or g * 0.5)
    params[0].register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    in_tiles(3)(x, *params).sum().backward()
    assert seen == ["tensor", "accumulated"]
    wanted = torch.autograd.grad(swiglu(x, *params).sum(), params[0])[0]  # this one's hook halves it as well
    assert_same(params[0].grad, wanted, 1e-6)


def test_ddp_sees_each_weight_ready_once():
    from tests.ranks import on_ranks

    assert on_ranks(2, ddp) == [None, None]


def ddp():
    import torch.distributed as dist

    from treering.techniques.tiling.tile import TiledRegion

    rank, mlp = dist.get_rank(), nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16))
    with torch.no_grad():
        for name, p in mlp.named_parameters():
            p.copy_(random(*p.shape, key=name))
    batches = [random(20, 16, key="b0", grad=False), random(13, 16, key="b1", grad=False)]
    mlp(torch.cat(batches)).square().sum().div(2).backward()
    wanted = {name: p.grad.clone() for name, p in mlp.named_parameters()}
    mlp.zero_grad()
    region, plain = TiledRegion("mlp", [mlp], "test"), mlp.forward
    mlp.forward = lambda x: region(plain, x, size=4)
    model = nn.parallel.DistributedDataParallel(mlp)
    model(batches[rank]).square().sum().backward()
    for name, p in mlp.named_parameters():
        assert_same(p.grad, wanted[name], 1e-6, name)


def test_a_weight_that_changes_before_the_backward_is_an_error_and_not_another_gradient():
    x, params = random(20, 16), weights()
    y = in_tiles(6)(x, *params).sum()
    with torch.no_grad():
        params[0].add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


@pytest.mark.parametrize(
    ("fn", "message"),
    [(lambda x: x.sum(-1).sum(), "one row a token"), (lambda x: x[:1], "one row a token")],
)
def test_a_function_that_does_not_give_a_row_a_token_is_refused(fn, message):
    with pytest.raises(PlanError, match=message):
        tile(fn, random(9, 4), size=4)


def test_tokens_that_do_not_agree_and_sums_that_are_no_numbers_are_refused():
    with pytest.raises(PlanError, match=r"\(9, 4\), \(8, 4\)"):
        tile(lambda x, y: x, random(9, 4), random(8, 4), size=4)
    with pytest.raises(PlanError, match="out is sum"):
        tile(lambda x: x, random(9, 4), size=4, out="sum")
