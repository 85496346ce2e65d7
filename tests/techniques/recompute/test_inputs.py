"""What a block may be given, and what is taken of it: layouts, keywords, tiles inside, changes in place."""

import pytest
import torch
from torch.autograd import Function

from tests.techniques.recompute.stacks import WIDTH, Watched, example, gradients, names, run, same, stack
from treering.core.errors import PlanError

LAYOUTS = {
    "a view with an offset": lambda x: torch.cat([x, x], 1)[:, 5:],
    "every second token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a part of the width": lambda x: torch.cat([x, x], -1)[..., :WIDTH],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(2, 5, WIDTH),
    "one token": lambda x: x[:, :1],
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_comes_back_as_it_was(layout):
    def once(blocks):
        x = example().requires_grad_()
        made = LAYOUTS[layout](x)
        blocks = blocks.to(made.dtype)
        (run(blocks, made) * 1.5).sum().backward()
        return [x.grad, *(p.grad for p in blocks.parameters())]

    wanted = once(stack(3, plain=True))
    engine = Watched(names(3))
    found = once(stack(3, engine))
    assert engine.sent == 2
    same(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_alignment_are_those_of_the_first_forward(layout):
    engine, seen = Watched(names(2)), []
    blocks = stack(2, engine)
    region = blocks[0].forward
    body = region.former
    region.replaced = lambda x: (seen.append((x.shape, x.stride(), x.storage_offset() % 16)), body(x))[1]
    made = LAYOUTS[layout](example().requires_grad_())
    run(blocks.to(made.dtype), made).sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_hidden_states_by_keyword_and_other_arguments_stay_where_they_are():
    def once(blocks):
        x, scale = example().requires_grad_(), torch.tensor(0.5)
        y = x
        for block in blocks:
            y = block(hidden_states=y, scale=scale)
        y.square().sum().backward()
        return [x.grad, *(p.grad for p in blocks.parameters())]

    engine = Watched(names(3))
    same(once(stack(3, engine)), once(stack(3, plain=True)))
    assert engine.sent == 2 and len(engine.kept) == 3


def test_a_block_without_a_tensor_is_refused():
    with pytest.raises(PlanError, match="b0 is called without a tensor"):
        stack(1, Watched(names(1)))[0](hidden=example())


class Tiled(Function):
    """What a tiled function does: nothing saved but its input, and a graph of its own in the backward."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.save_for_backward(x)
        ctx.block = block
        with torch.no_grad():
            return torch.cat([block(part) for part in x.split(2, 1)], 1)

    @staticmethod
    def backward(ctx, gradient):
        [x] = ctx.saved_tensors
        parts = [part.detach().requires_grad_() for part in x.split(2, 1)]
        with torch.enable_grad():
            for part, g in zip(parts, gradient.split(2, 1)):
                torch.autograd.backward(ctx.block(part), g)
        return torch.cat([part.grad for part in parts], 1), None


def test_what_is_saved_inside_a_block_is_never_packed_neither_weights_nor_tiles():
    engine = Watched(names(3))
    blocks = stack(3, engine)
    for block in blocks:
        region = block.forward
        body = region.former
        region.replaced = lambda x, body=body: Tiled.apply(x, body)
    gradients(blocks, example())
    assert len(engine.kept) == 3 and engine.sent == 2


def test_an_input_that_is_changed_in_place_is_refused():
    engine = Watched(names(3))
    blocks = stack(3, engine)
    x = example().requires_grad_() * 1.0
    y = blocks[0](x)
    x.add_(1)
    with pytest.raises(PlanError, match="the input of b0 was changed in place"):
        blocks[1](y)
    last = run(blocks[2:], y.detach().requires_grad_() * 1.0)
    kept = engine.kept[-1]()
    kept.tensor.add_(1)
    with pytest.raises(PlanError, match="the input of b2 was changed in place"):
        last.sum().backward()
