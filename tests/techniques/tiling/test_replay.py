"""The second run of a tile sees what the first saw: random numbers, autocast; and nobody else sees the second."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.same import assert_same
from tests.techniques.tiling.test_tile import in_tiles, random, swiglu, weights
from treering.technique import recompute_state, recomputing
from treering.techniques.tiling.tile import TiledRegion, tile


def test_dropout_drops_the_same_elements_in_the_backward():
    x, w = random(40, 8), random(8, 8, key="w")
    torch.manual_seed(3)
    y = tile(lambda x, w: F.dropout(x @ w, 0.5), x, params=(w,), size=7)
    after = torch.get_rng_state()
    found = torch.autograd.grad(y.sum(), [x, w])
    assert torch.equal(torch.get_rng_state(), after), "the backward leaves the random numbers alone"
    kept = (y.detach() != 0).float() * 2
    wanted = torch.autograd.grad(((x @ w) * kept).sum(), [x, w])
    for a, b in zip(found, wanted):
        assert_same(a, b, 1e-6)


@pytest.mark.parametrize("out", ["cat", "sum"])
def test_autocast_of_the_forward_holds_in_the_backward(out):
    x, params = random(40, 16), weights()
    fn = (lambda *a: swiglu(*a)) if out == "cat" else (lambda *a: swiglu(*a).float().square().sum())
    seen = []

    def body(*a):
        seen.append((a[0] @ a[1]).dtype)
        return fn(*a)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tile(body, x, params=params, size=7, out=out)
        plain = fn(x, *params)
    found = torch.autograd.grad(y.float().sum(), [x, *params])
    for a, b in zip(found, torch.autograd.grad(plain.float().sum(), [x, *params])):
        assert a.dtype == torch.float32
        assert_same(a, b, 2e-2)
    assert set(seen) == {torch.bfloat16}


class Casts(TorchDispatchMode):
    """Weights in bfloat16 that are alive."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.shape == (16, 24) and out.dtype == torch.bfloat16:
            self.made.append(weakref.ref(out))
        return out

    def alive(self):
        return sum(one() is not None for one in self.made)


@pytest.mark.parametrize("out", ["cat", "sum"])
def test_casts_of_one_tile_are_gone_before_the_next(out):
    x, params = random(40, 16), weights()
    left = []

    def body(*a):
        left.append(casts.alive())
        return swiglu(*a) if out == "cat" else swiglu(*a).float().sum()

    with Casts() as casts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = tile(body, x, params=params, size=7, out=out)
        torch.autograd.grad(y.float().sum(), [x, *params])
    assert len(casts.made) >= 2 * len(left) and set(left) == {0}


@pytest.mark.parametrize("size", [1000, 7])
def test_a_checkpoint_around_costs_two_forwards_and_not_three(size):
    x, params = random(40, 16), weights()
    states = []

    def body(*a):
        states.append(recompute_state())
        return swiglu(*a)

    def region(x):
        return x + tile(body, x * 2, params=params, size=size)

    def context():
        from contextlib import nullcontext

        return nullcontext(), recomputing("recompute")

    y = checkpoint(region, x, use_reentrant=False, context_fn=context)
    found = torch.autograd.grad(y.sum(), [x, *params])
    tiles = -(-40 // size)
    assert states == ["forward"] * tiles + ["tile"] * tiles
    for a, b in zip(found, torch.autograd.grad((x + swiglu(x * 2, *params)).sum(), [x, *params])):
        assert_same(a, b, 1e-6)


def test_a_reentrant_checkpoint_gives_the_same_gradients():
    x, params = random(40, 16), weights()
    y = checkpoint(lambda x: in_tiles(7)(x * 2, *params), x, use_reentrant=True)
    y.sum().backward()
    for t, wanted in zip((x, *params), torch.autograd.grad(swiglu(x * 2, *params).sum(), [x, *params])):
        assert_same(t.grad, wanted, 1e-6)


@pytest.mark.parametrize("out", ["cat", "sum"])
def test_hooks_on_saved_tensors_see_the_tokens_and_neither_weights_nor_tiles(out):
    x, params = random(40, 16), weights()
    packed = []
    keep = lambda t: packed.append(tuple(t.shape)) or t  # noqa: E731
    fn = swiglu if out == "cat" else lambda *a: swiglu(*a).sum()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = tile(fn, x, params=params, size=7, out=out).sum()
        torch.autograd.grad(y, [x, *params])
    # a sum keeps the gradients themselves, which it has already
    assert packed == ([(40, 16)] if out == "cat" else [(40, 16), *(tuple(p.shape) for p in params)])


def test_an_observer_inside_counts_each_token_once():
    layer = nn.Linear(8, 8)
    counted = {"forward": 0, "tile": 0}

    def count(module, args):
        counted[recompute_state()] += len(args[0])

    layer.register_forward_pre_hook(count)
    x = random(40, 8)
    TiledRegion("layer", [layer], "test")(layer, x, size=7).sum().backward()
    assert counted["forward"] == 40
    assert counted["tile"] == 40 + 64, "the backward, and both ways of the self-check on 32 tokens"
