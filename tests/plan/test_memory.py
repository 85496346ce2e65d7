"""Memory predicted from a few blocks without memory, against steps that really hold it."""

import pytest

import treering as tr
from tests.plan.memory_toys import CPU, llama, moe, really, subject
from treering.memory.forecast import forecast

LENGTH = 192
KEPT = [tr.Full(), tr.Recompute()]
CASES = {
    "grouped heads": (llama(num_key_value_heads=1), [tr.Full(), tr.Shard()], 1),
    "tied": (llama(tie_word_embeddings=True), [*KEPT, tr.Shard()], 2),
    "experts": (moe(), [*KEPT, tr.Shard()], 4),
    "adapters": (llama(), [tr.LoRA(rank=4), tr.Recompute(), tr.Shard()], 1),
    "64 ranks": (llama(), [*KEPT, tr.TiledLoss(tile=64), tr.Shard(compute="bfloat16")], 64),
    "64 ranks, offloaded": (
        llama(),
        [tr.Full(), tr.Recompute(offload="cpu"), tr.TiledLoss(tile=64), tr.Shard(compute="bfloat16", offload="cpu")],
        64,
    ),
    "offloaded": (llama(), [tr.Full(), tr.Recompute(offload="cpu"), tr.Shard(offload="cpu")], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_predicted_is_what_a_step_holds(name):
    config, techniques, world = CASES[name]
    settings = subject(config, techniques, world=world, on="cpu")
    foreseen = forecast(settings, LENGTH, device=CPU).at(LENGTH).device
    measured = really(settings, LENGTH).peak(LENGTH)
    assert foreseen == pytest.approx(measured, rel=0.03), f"{foreseen / measured:.4f}"
