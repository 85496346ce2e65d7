"""The three ways of computing a factored linear: one result, the counted cost, and nothing kept that can be remade."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.same import assert_same
from treering.techniques.osft import reference
from treering.techniques.osft.forward_factors import passes

WAYS = ("factored", "dense", "rebuilt")
LOW = ("U_low", "S_low", "V_low")


def factors(N, M, held, dtype=torch.float64, noise=0.1):
    """Low factors that lean into what is held, so that a projection has something to do."""
    torch.manual_seed(0)
    f = reference.split(torch.randn(N, M, dtype=dtype), held)
    return {n: (v + noise * torch.randn_like(v) if n in LOW else v).contiguous() for n, v in f.items()}


def linear(x, bias, f, way, projected):
    high = tuple(f[n] for n in ("U_high", "S_high", "V_high")) if f["S_high"].numel() else None
    return passes.linear(x, bias, high, tuple(f[n] for n in LOW), way=way, projected=projected)


def truth(x, bias, f, projected):
    if projected:
        f = f | {f"{e}_low": reference.project(f[f"{e}_low"], f[f"{e}_high"]) for e in "UV"}
    return reference.linear(x, f, bias)


def with_gradients(compute, x, bias, f):
    learning = [x, *([bias] if bias is not None else []), *(f[n] for n in LOW)]
    learning = [p.detach().requires_grad_() for p in learning]
    x, *middle = learning[:-3]
    y = compute(x, middle[0] if middle else None, f | dict(zip(LOW, learning[-3:])))
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y).view_as(y))
    return [y, *(p.grad for p in learning)]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("N", "M", "held"), [(12, 12, 9), (7, 20, 5), (20, 7, 5), (6, 9, 0), (6, 9, 1), (6, 9, 5)])
def test_every_way_equals_the_dense_linear_with_all_its_gradients(N, M, held, way, projected):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        f = factors(N, M, held, dtype)
        for shape in ((5, M), (2, 3, M)):
            for bias in (None, torch.randn(N, dtype=dtype)):
                x = torch.randn(*shape, dtype=dtype)
                found = with_gradients(lambda x, b, f: linear(x, b, f, way, projected), x, bias, f)
                wanted = with_gradients(lambda x, b, f: truth(x, b, f, projected), x, bias, f)
                for i, (a, b) in enumerate(zip(found, wanted)):
                    assert_same(a, b, tolerance, f"{dtype} {shape} {i}")


def test_the_ways_agree_to_1e_6_in_float32():
    f, x = factors(48, 64, 36, torch.float32), torch.randn(40, 64)
    for projected in (False, True):
        wanted = linear(x, None, f, "factored", projected)
        for way in WAYS[1:]:
            assert_same(linear(x, None, f, way, projected), wanted, 2e-6, way)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_tokens_leave_the_bases_and_their_gradients_in_float32(way):
    f, x = factors(24, 32, 18, torch.float32), torch.randn(50, 32).bfloat16()
    found = with_gradients(lambda x, b, f: linear(x, b, f, way, True), x, None, f)
    wanted = with_gradients(lambda x, b, f: truth(x, b, f, True), x.float(), None, f)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for i, (a, b) in enumerate(zip(found, wanted)):
        assert_same(a.float(), b, 3e-2, f"{way} {i}")
    for end, gradient in (("U", found[2]), ("V", found[4])):
        assert gradient.dtype == torch.float32
        assert (f[f"{end}_high"].T @ gradient).norm() < 1e-5 * gradient.norm(), "projected after rounding, not before"


@pytest.mark.parametrize("way", WAYS)
def test_autocast_rounds_tokens_and_never_bases(way):
    f, x = factors(24, 32, 18, torch.float32), torch.randn(50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, None, f, way, True)
    assert torch.equal(found, linear(x.bfloat16(), None, f, way, True))


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_counted_cost_is_what_runs(way, learning):
    N, M, held, tokens = 24, 40, 17, 30
    f, x = factors(N, M, held), torch.randn(tokens, M, dtype=torch.float64)
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.set_grad_enabled(learning):
        if learning:
            with_gradients(lambda x, b, f: linear(x, b, f, way, False), x, None, f)
        else:
            linear(x, None, f, way, False)
    assert counter.get_total_flops() == 2 * passes.multiplications(way, tokens, N, M, held, 24 - held, learning)


@pytest.mark.parametrize(("N", "M"), [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)])
def test_without_gradients_rebuilding_pays_from_the_longer_side_on(N, M):
    h, l = (3 * min(N, M)) // 4, min(N, M) // 4
    cost = {
        way: [passes.multiplications(way, t, N, M, h, l, False) for t in (max(N, M) - 1, max(N, M) + 1)] for way in WAYS
    }
    assert cost["factored"][0] < cost["rebuilt"][0] and cost["factored"][1] > cost["rebuilt"][1]
    assert passes.choose(64, N, M, h, l, False) == passes.choose(64, N, M, h, l, True) == "factored"
    assert passes.choose(1 << 20, N, M, h, l, False) == "rebuilt"
    assert passes.choose(1 << 16, N, M, min(N, M) - 8, 8, True) == "dense", "few free directions: their chain is cheap"


@pytest.mark.parametrize("way", WAYS)
def test_nothing_but_tokens_and_parameters_lives_until_the_backward(way):
    f, x = factors(24, 40, 17), torch.randn(30, 40, dtype=torch.float64, requires_grad=True)
    f |= {n: f[n].requires_grad_() for n in LOW}
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        linear(x * 1.0, None, f, way, True)
    assert len(saved - {v.data_ptr() for v in f.values()}) == 1, "x alone"


@pytest.mark.parametrize("projected", [False, True])
def test_stacked_experts_are_rebuilt_one_by_one(projected):
    f = reference.split(torch.randn(3, 8, 5, dtype=torch.float64), 3)
    f = {n: (v + 0.1 * torch.randn_like(v) if n in LOW else v) for n, v in f.items()}
    found = passes.weight(
        tuple(f[n] for n in ("U_high", "S_high", "V_high")), tuple(f[n] for n in LOW), projected, torch.float64
    )
    for e in range(3):
        one = {n: v[e] for n, v in f.items()}
        assert_same(found[e], truth(torch.eye(5, dtype=torch.float64), None, one, projected).T, 1e-12)
