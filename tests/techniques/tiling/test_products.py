"""Products of a tile: how many there are, what is added where, and that all of it is exact."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import treering as tr
from tests.same import assert_same
from tests.techniques.tiling.test_models import gradients
from tests.techniques.tiling.test_tile import random
from tests.zoo import build
from treering.techniques.tiling import tile_job
from treering.techniques.tiling.products import Uncomputed, Unread, products
from treering.techniques.tiling.tile import TiledRegion, tile
from treering.techniques.tiling.tile_job import Gradient

aten = torch.ops.aten
PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2), aten.bmm: (0, 1)}
ADDS = (aten.add, aten.add_)


class Counted(TorchDispatchMode):
    """Counts multiplications in products of matrices, and elements of weights' shapes that are added by themselves."""

    def __init__(self, *weights):
        super().__init__()
        self.shapes = {tuple(w.shape) for w in weights}
        self.multiplied, self.added, self.calls = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        self.calls[kind] += 1
        if kind in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[kind])
            self.multiplied += a.numel() * b.shape[-1]
        if kind in ADDS and tuple(out.shape) in self.shapes:
            self.added += out.numel()
        return out


@pytest.mark.parametrize("out", ["cat", "sum"])
@pytest.mark.parametrize("shape", [(50, 16), (2, 25, 16)])
def test_gradients_of_weights_are_added_in_the_product(out, shape):
    w, b = random(24, 16, key="w", dtype=torch.float64), random(24, key="b", dtype=torch.float64)
    x = random(*shape, dtype=torch.float64)
    fn = lambda x, w, b: F.linear(x, w, b).tanh() if out == "cat" else F.linear(x, w, b).tanh().sum()  # noqa: E731
    wanted = torch.autograd.grad(F.linear(x, w, b).tanh().sum(), [x, w, b])
    with Counted(w) as counted:
        y = tile(fn, x, params=[w, b], size=12, out=out, dims=len(shape) - 1)
        found = torch.autograd.grad(y.sum(), [x, w, b])
    for one, other in zip(found, wanted):
        assert_same(one, other, 1e-14)
    assert counted.calls[aten.addmm_] == 4 and counted.added == 0, "five tiles, the first of which begins the sum"


def test_a_weight_that_is_used_in_two_ways_has_the_sum_of_both():
    x, w = random(30, 8, dtype=torch.float64), random(8, 8, key="w", dtype=torch.float64)
    fn = lambda x, w: F.linear(F.linear(x, w).tanh() @ w, w)  # noqa: E731
    wanted = torch.autograd.grad(fn(x, w).square().sum(), [x, w])
    for one, other in zip(torch.autograd.grad(tile(fn, x, params=[w], size=7).square().sum(), [x, w]), wanted):
        assert_same(one, other, 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_of_a_card_adds_in_float32_into_the_sum_itself(dtype, monkeypatch):
    """Its kernel is not on the CPU: shapes and dtypes are checked without values."""
    assert tile_job._sums_wide(torch.empty(1, dtype=dtype, device="meta"), torch.float32) is False
    monkeypatch.setattr(tile_job, "_sums_wide", lambda a, dtype: a.dtype != dtype)
    g, x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((9, 5), (9, 3), (5, 3)))
    total = Gradient(w, cut=False, tiles=2, wide=True)
    with Counted(w) as counted:
        total.add_product(g, x)
        first = total.value
        total.add_product(g, x)
    assert total.value is first and first.dtype == torch.float32 and tuple(first.shape) == (5, 3)
    assert counted.calls == {aten.t: 2, aten.mm: 1, aten.addmm: 1} and counted.added == 0


def block_products(techniques, adapting, **how):
    run = tr.compose(build("llama", dtype=torch.float64, **how), [adapting, *techniques])
    batches = [{"input_ids": torch.arange(3, 43)[None], "labels": torch.arange(3, 43)[None]}]
    for _ in range(2):  # the first call of a part is checked
        (ready,) = run.ready(next(iter(tr.plan.batches.steps([batches], 1, None))))
        with Counted() as counted:
            run.loss(ready).backward()
    return counted.multiplied


@pytest.mark.parametrize("tile", [16, 1000])
@pytest.mark.parametrize("adapting", [tr.Full(), tr.LoRA(rank=4, dtype="float64")])
def test_tiled_blocks_multiply_no_more_than_the_recompute_that_they_are_in(tile, adapting):
    alone = block_products([tr.Recompute()], adapting)
    assert block_products([tr.TiledBlock(tile=tile), tr.Recompute()], adapting) <= alone
    once = block_products([], adapting)
    assert once < alone


def test_what_is_read_is_found():
    x, a, b = random(6, 4), random(4, 4, key="a"), random(4, 4, key="b")
    bodies = {
        "last": (lambda: x + 2 * F.linear(F.silu(F.linear(x, a)), b).view(6, 4), {1}),
        "low rank": (lambda: F.linear(x, a) + F.linear(F.linear(x, b), a) * 0.5, {0, 2}),
        "an adapter": (lambda: torch.addmm(F.linear(x, a).flatten(0, -2), 2 * F.linear(x, b), a.mT).view_as(x), {0}),
        "another dtype": (lambda: x + F.linear(x.double(), a.double()).to(x.dtype), {0}),
        "a norm behind it": (lambda: F.rms_norm(F.linear(x, a), (4,)) + x, set()),
        "two products": (lambda: F.linear(x, a) * F.linear(x, b), set()),
        "two results": (lambda: (F.linear(x, a), F.linear(x, b).detach().argmax(-1)), {0}),
        "a mask": (lambda: x.masked_fill(F.linear(x, a) > 0, 0.0), set()),
        "in place": (lambda: F.linear(x, a).add_(x), set()),
    }
    for name, (body, unread) in bodies.items():
        with torch.no_grad(), Unread() as found:
            body()
        assert found.numbers() == unread, name


def test_a_result_that_is_read_after_all_is_computed():
    m = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).double()
    x = random(5, 4, dtype=torch.float64)
    wanted = torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()])
    with products({}, frozenset([0, 1]), x.device):
        y = m(x)
        assert isinstance(y, Uncomputed) and y.shape == (5, 4)
        found = torch.autograd.grad(y.square().sum(), [x, *m.parameters()])
    for one, other in zip(found, wanted):
        assert torch.equal(one, other)


def test_what_changes_before_it_is_read_is_an_error_and_not_another_value():
    x, w = random(5, 4, grad=False), random(4, 4, key="w")
    with products({}, frozenset([0]), x.device):
        y = F.linear(x, w)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="changed in place"):
            y.exp()
        with pytest.raises(RuntimeError, match="not computed"):
            y.detach().add_(1.0)


def test_hooks_that_come_later_read_the_values():
    m = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    region, x, seen = TiledRegion("m", [m], "test"), random(9, 4), []
    region(m, x, size=4).sum().backward()
    m[2].register_forward_hook(lambda module, args, out: seen.append(out.detach() * 1.0))
    region(m, x, size=4).sum().backward()
    rows = torch.cat([y if type(y) is torch.Tensor else y.values() for y in seen[3:]])
    assert_same(rows, m(x), 1e-6)


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "olmo2", "phi3"])
def test_norms_behind_products_and_fused_products_are_exact(name):
    wanted = gradients(name, [tr.Recompute()])
    found = gradients(name, [tr.TiledBlock(tile=4), tr.Recompute()])
    for key, value in wanted.items():
        assert_same(found[key], value, 1e-6 if "gemma" in name else 1e-12, key)
