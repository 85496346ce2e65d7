"""Functions of logits against the reference, which has all logits at once; and that the tiles never have them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.same import assert_same
from tests.techniques.tiling.test_tile import random
from treering.techniques.tiling import reference
from treering.techniques.tiling.losses import OutputHead, TiledHead

N, H, V = 37, 16, 101
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 1.5, "scale": 2.0},
}


def linear(key="head", bias=False, dtype=torch.float64):
    made = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(0.5 * random(*p.shape, key=f"{key}.{name}"))
    return made


def some(dtype=torch.float64, masked=()):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[list(masked)] = -100
    return random(N, H, dtype=dtype), targets


def check(found, wanted, leaves, tolerance=1e-12):
    assert_same(found.detach(), wanted.detach(), tolerance)
    scale = 0.3  # what comes in from above: it has to scale every gradient
    ours, plain = torch.autograd.grad(scale * found.sum(), leaves), torch.autograd.grad(scale * wanted.sum(), leaves)
    for a, b in zip(ours, plain):
        assert_same(a, b, tolerance)


@pytest.mark.parametrize("size", [100, 10, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)])
def test_cross_entropy_is_that_of_all_logits(size, kind, smoothing, z_loss):
    how = dict(KINDS[kind])
    head = linear(bias=how.pop("bias", False))
    hidden, targets = some(masked=(0, 5, 6, 36))
    z = reference.logits(hidden, head.weight, head.bias, how.get("scale", 1.0), how.get("softcap"))
    found = TiledHead(OutputHead(module=head, **how)).cross_entropy(
        hidden, targets, size=size, label_smoothing=smoothing, z_loss=z_loss
    )
    check(found, reference.cross_entropy(z, targets, smoothing, z_loss), [hidden, *head.parameters()])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_of_all_logits(reverse, temperature):
    head, teacher = linear(), linear("teacher")
    hidden, targets = some(masked=(3, 4))
    other = random(N, H, key="other", dtype=torch.float64)
    student, taught = hidden @ head.weight.T, (other @ teacher.weight.T).detach()
    found = TiledHead(OutputHead(module=head)).distillation(
        hidden, OutputHead(module=teacher), other, targets, size=7, temperature=temperature, reverse=reverse
    )
    pair = (student, taught) if reverse else (taught, student)
    check(found, reference.divergence(*pair, targets, temperature), [hidden, head.weight])
    assert torch.autograd.grad(found, [other, teacher.weight], allow_unused=True) == (None, None)


def test_log_probabilities_take_any_gradient_a_token():
    head = linear()
    hidden, targets = some(masked=(3, 4))
    advantage = random(N, key="advantage", dtype=torch.float64, grad=False)
    found = TiledHead(OutputHead(module=head)).log_probabilities(hidden, targets, size=7)
    assert not found[3:5].any()
    z = (hidden @ head.weight.T).log_softmax(-1)
    wanted = z.gather(1, targets.clamp_min(0)[:, None])[:, 0] * (targets != -100)
    check(found * advantage, wanted * advantage, [hidden, head.weight])


def test_a_value_head_may_be_any_module():
    head = nn.Sequential(nn.Linear(H, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    hidden = random(3, 11, H, dtype=torch.float64)
    found = TiledHead(OutputHead(module=head)).values(hidden, size=7)
    assert found.shape == (3, 11, 1)
    check(found.square(), head(hidden).square(), [hidden, *head.parameters()])


@pytest.mark.parametrize("masked", [range(N), range(20)])
def test_masked_tiles_and_batches_give_zero_and_never_nan(masked):
    head = linear()
    hidden, targets = some(masked=masked)
    with torch.no_grad():
        hidden[0] = 1e300  # an untrained token may be anything
    loss = TiledHead(OutputHead(module=head)).cross_entropy(hidden, targets, size=10, label_smoothing=0.1, z_loss=0.0)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    assert all(bool(torch.isfinite(t).all()) for t in (loss, *found))
    assert not found[0][: len(masked)].any()
    if len(masked) == N:
        assert float(loss.detach()) == 0 and not found[1].any()


def test_bfloat16_logits_are_judged_in_float32():
    head = linear(dtype=torch.bfloat16)
    hidden, targets = some(dtype=torch.bfloat16)
    wanted = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    found = TiledHead(OutputHead(module=head)).cross_entropy(hidden, targets, size=10)
    assert found.dtype == torch.float32
    check(found, wanted, [hidden], 1e-2)


class Watched(TorchDispatchMode):
    """The largest tensor that is made, and everything that has to wait for the device."""

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waits.append(func.name())
        return out


def test_no_tensor_has_tokens_times_vocabulary_elements_and_nothing_waits():
    head, n, v = nn.Linear(4, 1000, bias=False), 400, 1000
    hidden, targets = random(n, 4), torch.randint(v, (n,))
    tiled = TiledHead(OutputHead(module=head))
    first = tiled.cross_entropy(hidden, targets, size=10)  # its self-check looks at values, once
    with Watched() as seen:
        loss = tiled.cross_entropy(hidden, targets, size=10, z_loss=1e-3)
        loss.backward()
        tiled.log_probabilities(hidden, targets, size=10).sum().backward()
    assert seen.largest <= 10 * v and not seen.waits
    with Watched() as seen:
        F.cross_entropy(head(hidden), targets).backward()
        float(first)
    assert seen.largest == n * v and seen.waits, "this would see it"
