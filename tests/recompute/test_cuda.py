"""On a GPU: what the pretended stream cannot show. Skipped where there is none."""

import pytest
import torch

import treering as tr
from tests.same import assert_all_same
from tests.toy import gradients, packed, rows
from tests.zoo import build
from treering.recompute import Recompute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("batches", [rows(3), [packed((7, 5, 4))]], ids=["rows", "packed"])
def test_gradients_are_bitwise_those_without_offload(batches):
    run = tr.compose(build("llama"), [tr.Full(), Recompute()])
    wanted = gradients(run, batches)
    run = tr.compose(build("llama"), [tr.Full(), Recompute(offload="cpu")])
    assert_all_same(gradients(run, batches), wanted)
    engine = run.model.model.layers[0].forward.engine
    assert engine.sent and engine.pool.pinned and engine.pool.used == 0


def test_long_inputs_many_times_over_are_never_mixed_up():
    """Copies that are slower than blocks: without the right waits, some of a hundred would come back as others."""
    from tests.recompute.stacks import stack
    from treering.recompute.offload import Offload

    names = tuple(f"b{i}" for i in range(12))
    engine = Offload(names)
    blocks, plain = stack(12, engine).cuda(), stack(12, plain=True).cuda()
    for seed in range(20):
        x = torch.randn(1, 400_000, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        grads = []
        for some in (plain, blocks):
            y = leaf = x.clone().requires_grad_()
            for block in some:
                y = block(y)
            y.square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_memory_of_the_device_holds_two_inputs_at_a_time():
    from tests.recompute.stacks import stack
    from treering.recompute.offload import Offload

    peaks = {}
    for count in (6, 18):
        blocks = stack(count, Offload(tuple(f"b{i}" for i in range(count)))).cuda()
        x = torch.randn(1, 400_000, 8, device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            y = x.clone().requires_grad_()
            for block in blocks:
                y = block(y)
            y.sum().backward()
        peaks[count] = torch.cuda.max_memory_allocated()
    assert peaks[18] - peaks[6] < x.numel() * 4, "twelve more blocks may not cost another input on the device"
