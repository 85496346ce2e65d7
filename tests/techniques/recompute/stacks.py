"""A few recomputed blocks, with an engine whose copies are as late as can be and whose targets start as garbage."""

import weakref

import torch
from torch import nn

from treering.techniques.recompute.copies import HostPool, SimulatedCopies
from treering.techniques.recompute.offload import Offload
from treering.techniques.recompute.recomputed_block import RecomputedBlock

WIDTH = 8


class Poisoned(SimulatedCopies):
    """Bytes of ones, NaN in every floating dtype, stand in a target until its copy is made."""

    def copy(self, pairs):
        for target, _ in pairs:
            target.fill_(255)
        return super().copy(pairs)


class Watched(Offload):
    """Remembers, weakly, what was kept, and in which order tensors left and came."""

    def __init__(self, names, **settings):
        self.device = Poisoned()
        super().__init__(names, copies=lambda _: self.device, pool=HostPool(False, slab=1 << 12), **settings)
        self.kept = []

    def _pack(self, index, tensor):
        made = super()._pack(index, tensor)
        self.kept.append(weakref.ref(made))
        return made

    def on_device(self):
        """The blocks whose input is on the device, or on its way there."""
        alive = [one for ref in self.kept if (one := ref()) is not None]
        return [one.block for one in alive if one.tensor is not None]

    def alive(self):
        return sum(ref() is not None for ref in self.kept)


class Block(nn.Module):
    """A residual block that can drop, look at what happens, or fail."""

    def __init__(self, drop=0.0, look=None):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop, self.look = drop, look

    def forward(self, hidden_states, scale=None):
        if self.look is not None:
            self.look()
        y = nn.functional.dropout(torch.tanh(self.up(hidden_states)), self.drop)
        y = self.down(y)
        return hidden_states + (y if scale is None else y * scale)


def stack(number, engine=None, plain=False, **settings):
    """`number` blocks with the same weights each time; `plain`: without RecomputedBlock."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks = nn.ModuleList(Block(**settings) for _ in range(number))
    for i, block in enumerate(blocks):
        if not plain:
            RecomputedBlock(block, f"b{i}", i, (), False, engine)
    return blocks


def names(number):
    return tuple(f"b{i}" for i in range(number))


def run(blocks, x, **call):
    for block in blocks:
        x = block(x, **call)
    return x


def example(seed=0, shape=(2, 5, WIDTH)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(blocks, x, **call):
    """Of all weights and of x, for a loss that tells every element of the output apart."""
    x = x.clone().requires_grad_() if x.is_leaf else x
    y = run(blocks, x, **call)
    (y * example(9, tuple(y.shape))).sum().backward()
    return [x.grad, *(p.grad for p in blocks.parameters())]


def same(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
