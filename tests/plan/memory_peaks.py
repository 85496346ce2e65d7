"""The traced peaks of standard configurations, kept in memory_peaks.json so that a change that costs memory is seen.

python -m tests.plan.memory_peaks      write them anew
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

import treering as tr
from tests.plan.memory_toys import llama_8b, moe, subject
from treering.memory import Subject, forecast

FILE = Path(__file__).with_suffix(".json")
LENGTH, TRACED = 32768, 4096  # longer than a tile of the loss
HALF = {"dtype": torch.bfloat16}


def mixture() -> Subject:
    sizes = {"vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
    experts = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    config = moe(**sizes, **experts, num_hidden_layers=12)
    return subject(config, [tr.Full(), tr.Recompute(), tr.TiledLoss(), tr.Shard()], world=64, **HALF)


STANDARD: dict[str, Callable[[], Subject]] = {
    "llama-8b, 8 ranks": lambda: subject(llama_8b(), [tr.Full(), tr.Shard(compute="bfloat16")], world=8),
    "llama-8b, 8 ranks, tiled": lambda: subject(
        llama_8b(),
        [
            tr.Full(),
            tr.TiledBlock(tile=1024),
            tr.TiledLoss(tile=1024),
            tr.Recompute(),
            tr.Shard(compute="bfloat16"),
        ],
        world=8,
    ),
    "llama-8b, 1 rank, lora, offloaded": lambda: subject(
        llama_8b(), [tr.LoRA(dtype="base"), tr.Recompute(offload="cpu"), tr.Shard(offload="cpu")], **HALF
    ),
    "mixture of experts, 64 ranks": mixture,
}


def peak(name: str) -> float:
    """GiB on the device of each rank at `LENGTH`."""
    return forecast(STANDARD[name](), TRACED).at(LENGTH).device / 2**30


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: round(peak(name), 4) for name in STANDARD}, indent=1) + "\n", "utf-8")
