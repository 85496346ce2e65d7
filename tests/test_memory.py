"""What loading a folder costs in host memory: this rank's shards and no more than two blocks beside them.

The figure is the growth of the peak resident set (VmHWM, reset before loading), the strictest there is: it counts the
pages of the mapped file that are in this process as well as what it allocated, although the former are shared by all
ranks and can be taken back by the system at any time.
"""

import re
from pathlib import Path

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.zoo import save

BLOCKS = 8


def big(folder: Path) -> tuple[int, int]:
    """A llama of eight blocks and little besides; returns the bytes of the model and of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.save_pretrained(folder)
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())  # noqa: E731
    return size(model), size(model.model.layers[0])


def resident(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024


def peak_of_loading(warm, folder, technique):
    tr.compose(warm, [technique, tr.Shard()])  # code, threads and communicators are not what is measured
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    run = tr.compose(folder, [technique, tr.Shard()])
    return resident("VmHWM") - before, sum(p.to_local().numel() * 4 for p in run.model.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_rank_never_holds_more_than_its_shards_and_two_blocks(tmp_path):
    whole, block = big(tmp_path / "m")
    warm = save("llama", tmp_path / "warm")
    for technique in (tr.Full(), tr.LoRA(rank=4)):
        for peak, shards in on_ranks(2, peak_of_loading, warm, tmp_path / "m", technique):
            assert whole * 0.49 < shards < whole * 0.52
            assert peak <= shards + 2 * block, f"{peak / block:.2f} blocks for shards of {shards / block:.2f}"
            assert peak > shards * 0.9, "the measurement misses what was loaded"
