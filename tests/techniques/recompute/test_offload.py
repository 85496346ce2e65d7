"""What leaves the device, when it comes back, and who gives what back."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.techniques.recompute.stacks import WIDTH, Watched, example, gradients, names, run, same, stack
from treering.technique import recompute_state
from treering.techniques.recompute import offload
from treering.techniques.recompute.reference import forward_and_backward


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_of_the_plain_truth_bit_for_bit(number, offload):
    wanted = gradients(stack(number, plain=True), example())
    found = gradients(stack(number, Watched(names(number)) if offload else None), example())
    same(found, wanted)
    blocks = stack(number, plain=True)
    _, dx = forward_and_backward(blocks, example(), example(9, tuple(example().shape)))
    same([dx, *(p.grad for p in blocks.parameters())], wanted)


def test_exactly_one_tensor_a_block_leaves_and_it_is_the_input():
    engine = Watched(names(4))
    x, inputs = example().requires_grad_(), []
    for block in stack(4, engine):
        inputs.append(x)
        x = block(x)
    kept = [ref() for ref in engine.kept]
    assert len(kept) == 4 and engine.sent == 3
    assert [k.layout[0] for k in kept] == [x.shape] * 4
    engine.device.run_until(engine.device.asked)
    for one, value in zip(kept, inputs):
        held = torch.cat(one.pieces)[: value.numel() * 4].view(torch.float32) if one.pieces else one.tensor.flatten()
        assert torch.equal(held.view_as(value), value)


def test_in_the_forward_an_input_stays_no_longer_than_until_the_next_block():
    engine, seen = Watched(names(5)), []
    blocks = stack(5, engine)
    for block in blocks:
        block.look = lambda: seen.append(engine.on_device())
    x, storages = example().requires_grad_() * 1.0, []  # a leaf would be kept by the graph
    for block in blocks:
        storages.append(StorageWeakRef(x.untyped_storage()))
        x = block(x)
    assert seen == [["b0"], ["b1"], ["b2"], ["b3"], ["b4"]]
    assert [ref.expired() for ref in storages] == [True] * 4 + [False], "the last block's input stays, and no other"


@pytest.mark.parametrize(
    ("prefetch", "on_device", "running"),
    [
        (1, [["b3", "b4"], ["b2"], ["b1"], ["b0"], []], [1, 1, 1, 1]),
        (2, [["b2", "b3", "b4"], ["b1", "b2"], ["b0", "b1"], ["b0"], []], [2, 2, 2, 1]),
        (None, [["b2", "b3", "b4"], ["b1", "b2"], ["b0", "b1"], ["b0"], []], [2, 2, 2, 1]),  # inputs are short
        (9, [["b0", "b1", "b2", "b3", "b4"], ["b0", "b1", "b2"], ["b0", "b1"], ["b0"], []], [4, 3, 2, 1]),
    ],
)
def test_in_the_backward_blocks_before_are_on_their_way_while_one_is_run_again(prefetch, on_device, running):
    engine, seen = Watched(names(5), prefetch=prefetch), []
    blocks = stack(5, engine)
    y = run(blocks, example().requires_grad_())
    for block in blocks:
        block.look = lambda: seen.append((engine.on_device(), engine.device.done, engine.device.asked))
    y.sum().backward()
    # The running block's own tensor has been handed over; those before are held, and nobody waited for their copies.
    assert [on for on, _, _ in seen] == on_device
    assert [asked - made for _, made, asked in seen[:-1]] == running
    assert engine.device.asked == 8, "each of four inputs left once and came back once"


@pytest.mark.parametrize("first", [1, 2, 4])
def test_only_the_first_blocks_leave_if_so_asked(first):
    engine = Watched(names(4), first_blocks=first)
    found = gradients(stack(4, engine), example())
    assert engine.sent == min(first, 3)
    same(found, gradients(stack(4, plain=True), example()))


def test_a_budget_takes_the_first_blocks_and_counts_what_waits_from_earlier_forwards():
    engine = Watched(names(4), budget=3 * 4096)
    blocks = stack(4, engine)
    x = example().requires_grad_()
    first = run(blocks, x)
    assert engine.sent == 3 and engine.pool.used == 3 * 4096
    second = run(blocks, x)
    assert engine.sent == 3, "the budget is spent"
    (first + second).sum().backward()
    found = x.grad.clone()
    del first, second
    assert engine.pool.used == 0 and engine.pool.allocated == 3 * 4096
    x.grad = None
    plain = stack(4, plain=True)
    (run(plain, x) + run(plain, x)).sum().backward()
    assert torch.equal(found, x.grad)


def test_a_budget_bounds_what_is_allocated_whatever_the_lengths():
    budget = 60 * 4096
    engine = Watched(names(6), budget=budget)
    engine.pool.slab = 1 << 15  # so that ends are pieces of several sizes
    blocks = stack(6, engine)
    for tokens in (700, 20, 300, 11, 650, 128, 40, 700):
        found = gradients(blocks, example(shape=(1, tokens, WIDTH)))
        assert engine.pool.allocated <= budget and engine.sent
        same(found, gradients(stack(6, plain=True), example(shape=(1, tokens, WIDTH))))
        blocks.zero_grad(set_to_none=True)


def test_host_memory_is_used_again_whatever_the_lengths():
    engine = Watched(names(6))
    blocks = stack(6, engine)
    held = []
    for tokens in (700, 300, 650, 128, 700):
        gradients(blocks, example(shape=(1, tokens, WIDTH)))
        held.append(engine.pool.allocated)
        assert engine.pool.used == 0
    assert held[-1] <= held[0] * 1.2


def test_an_input_without_gradient_is_kept_too():
    def once(blocks):
        run(blocks, example()).sum().backward()
        return [p.grad for p in blocks.parameters()]

    engine = Watched(names(3))
    same(once(stack(3, engine)), once(stack(3, plain=True)))
    assert engine.sent == 2


def test_dropout_is_drawn_again_alike():
    def once(blocks):
        torch.manual_seed(5)
        found = gradients(blocks, example())
        return [*found, torch.rand(3)]  # what is drawn afterwards is the same too

    wanted = once(stack(3, plain=True, drop=0.3))
    same(once(stack(3, Watched(names(3)), drop=0.3)), wanted)
    same(once(stack(3, drop=0.3)), wanted)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_holds_in_the_second_forward_wherever_the_backward_runs(inside):
    def once(blocks):
        x = example().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(blocks, x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [x.grad, *(p.grad for p in blocks.parameters())]

    wanted = once(stack(3, plain=True))
    same(once(stack(3, Watched(names(3)))), wanted)
    exact = gradients(stack(3, plain=True), example())
    assert not torch.equal(exact[1], wanted[1]), "autocast changed nothing: the case does not test what it says"


def test_a_graph_can_be_gone_through_twice():
    engine = Watched(names(4))
    blocks = stack(4, engine)
    x = example().requires_grad_()
    y = run(blocks, x).sum()
    [once] = torch.autograd.grad(y, x, retain_graph=True)
    assert engine.pool.used > 0
    [again] = torch.autograd.grad(y, x)
    assert torch.equal(once, again)
    del y
    assert engine.pool.used == 0 and not engine.alive()


def test_two_forwards_before_their_backwards_in_either_order():
    for first, second in ((0, 1), (1, 0)):
        engine = Watched(names(3))
        blocks, plain = stack(3, engine), stack(3, plain=True)
        xs = [example(i).requires_grad_() for i in range(2)]
        ys = [run(blocks, x).square().sum() for x in xs]
        ys[first].backward()
        ys[second].backward()
        for x in xs:
            run(plain, x.detach()).square().sum().backward()
        wanted = [example(i).requires_grad_() for i in range(2)]
        for x in wanted:
            run(stack(3, plain=True), x).square().sum().backward()
        same([x.grad for x in xs], [x.grad for x in wanted])


def fail():
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["forward", "second forward", "backward", "between"])
def test_an_aborted_step_leaves_nothing_behind(where):
    engine = Watched(names(4))
    blocks = stack(4, engine)
    x = example().requires_grad_()

    def step():
        if where == "forward":
            blocks[2].look = fail
        y = run(blocks, x)
        if where == "second forward":
            blocks[1].look = fail
        if where == "backward":
            blocks[1].up.weight.register_hook(lambda g: fail())
        if where == "between":
            fail()
        y.sum().backward()

    with pytest.raises(KeyboardInterrupt):
        step()
    torch.zeros(1, requires_grad=True).backward()  # torch's own queue keeps what an aborted backward had not reached
    assert engine.pool.used == 0 and not engine.alive() and not engine.device.waiting
    assert recompute_state() == "forward"
    for block in blocks:
        block.look, block.up.weight._backward_hooks, block.up.weight.grad = None, None, None
    blocks.zero_grad(set_to_none=True)
    same(gradients(blocks, example()), gradients(stack(4, plain=True), example()))


def test_without_gradients_nothing_is_kept():
    engine = Watched(names(3))
    blocks = stack(3, engine)
    with torch.no_grad():
        y = run(blocks, example())
    assert not engine.kept and torch.equal(y, run(stack(3, plain=True), example()))


def test_each_pass_can_be_told_from_the_other():
    seen = []
    blocks = stack(2, Watched(names(2)), look=lambda: seen.append(recompute_state()))
    gradients(blocks, example())
    assert seen == ["forward", "forward", "recompute", "recompute"]
    assert recompute_state() == "forward"


def test_longer_inputs_come_back_one_at_a_time(monkeypatch):
    monkeypatch.setattr(offload, "SHORT", 4 * example().numel() - 1)
    engine, seen = Watched(names(4)), []
    blocks = stack(4, engine)
    y = run(blocks, example().requires_grad_())
    for block in blocks:
        block.look = lambda: seen.append(engine.on_device())
    y.sum().backward()
    assert seen == [["b2", "b3"], ["b1"], ["b0"], []]


@pytest.mark.parametrize("budget", [None, 60 * 4096])
def test_memory_is_allocated_before_the_first_block_runs_and_never_again(budget):
    engine, seen = Watched(names(6), budget=budget), []
    blocks = stack(6, engine)
    for block in blocks:
        block.look = lambda: seen.append(engine.pool.allocations)
    for _ in range(3):
        blocks.zero_grad(set_to_none=True)
        found = gradients(blocks, example(shape=(1, 300, WIDTH)))
    assert len(set(seen)) == 1 and seen[0] == engine.pool.allocations
    same(found, gradients(stack(6, plain=True), example(shape=(1, 300, WIDTH))))
