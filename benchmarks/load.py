"""Host memory that loading a folder on two ranks takes: each rank's shards, and how many blocks beside them.

    python -m benchmarks.load [--quick] [--machine cpu2]

The growth of the peak resident set while `compose` runs, after a first `compose` of a tiny model has brought in code
and threads. Linux only: the peak is read, and reset, in /proc.
"""

import argparse
import multiprocessing
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import row, write

BLOCKS = 12


def make(folder: Path, width: int, blocks: int) -> int:
    """A llama of equal blocks and little besides; returns the bytes of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(rank: int, store: str, warm: Path, folder: Path, technique: str, results: Any) -> None:
    import torch.distributed as dist

    import treering as tr

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    made = tr.Full() if technique == "full" else tr.LoRA(rank=8)
    tr.compose(warm, [made, tr.Shard()])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    run = tr.compose(folder, [made, tr.Shard()])
    peak = resident("VmHWM") - before
    shards = sum(p.to_local().numel() * p.element_size() for p in run.model.parameters())
    results.put(peak - shards)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        width = 512 if options.quick else 1024
        block = make(root / "model", width, BLOCKS)
        make(root / "warm", 64, 1)
        for technique in ("full", "lora"):
            results = spawn.Queue()
            store = str(root / f"store-{technique}")
            arguments = (store, root / "warm", root / "model", technique, results)
            ranks = [spawn.Process(target=measure, args=(rank, *arguments)) for rank in range(2)]
            for rank in ranks:
                rank.start()
            beside = [results.get(timeout=300) / block for _ in ranks]
            for rank in ranks:
                rank.join()
            rows.append(
                row(
                    "peak host memory of loading, beside a rank's shards",
                    f"{technique}, {BLOCKS} blocks of {block / 2**20:.0f} MiB, 2 ranks",
                    beside, unit="blocks", at_most=2.0, packages=("treering", "torch", "safetensors"),
                    command="python -m benchmarks.load" + (" --quick" if options.quick else ""),
                )
            )  # fmt: skip
    write("load", options.machine, rows)


if __name__ == "__main__":
    main()
