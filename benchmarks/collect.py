"""What `Collect` adds to a training step: rows of every document, next to the same step without it.

python -m benchmarks.collect [--quick]

Llamas of three layers and three widths, 1,024 tokens a step in documents of 128, AdamW, one thread. The sides alternate
in one process, a whole pass over two steps at a time; seconds are those of the process. The cost is that of two thin
products for each matrix, so that it falls with the width of the model. Sketches without a curvature cost what those
with one do: the matrices that are multiplied have the same shapes.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

import treering as tr
from benchmarks.rows import Row, row, write
from treering.data.document import Document
from treering.data.loader import collate

COMMAND = "python -m benchmarks.collect"
WIDTHS = {256: (512, 4), 576: (1536, 9), 1024: (2816, 16)}  # width: (inner, heads)
LENGTH, STEPS, ROUNDS = 128, 2, 7
VOCABULARY = 2048


def model(width: int) -> Any:
    """A Llama with random weights, the same at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    inner, heads = WIDTHS[width]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def batches() -> list[dict[str, Any]]:
    """The micro-batch of each step."""
    draw = np.random.default_rng(0)
    steps = []
    for step in range(STEPS):
        documents = [
            Document(
                ids=draw.integers(VOCABULARY, size=LENGTH, dtype=np.uint32),
                mask=np.arange(LENGTH) > 0,
                sample_id=f"random:{8 * step + i + 1}",
            )
            for i in range(8)
        ]
        steps.append(collate(documents, 8 * (LENGTH - 1), "cpu"))
    return steps


def seconds(run: Any, optimizer: Any, steps: Sequence[dict[str, Any]]) -> float:
    """The time of a pass over the steps."""
    began = time.process_time()
    for step in steps:
        for batch in run.ready([step]):
            run.loss(batch).backward()
        run.step(optimizer, clip=1.0)
    return time.process_time() - began


def rows(rounds: int, widths: Sequence[int]) -> Iterator[Row]:
    for width in widths:
        for name, technique in (("full", tr.Full()), ("lora, rank 16", tr.LoRA(rank=16))):
            folder = tempfile.mkdtemp()
            sides = {
                "plain": [technique],
                "psift 16": [technique, tr.Collect(to=f"{folder}/16", curvature="identity")],
                "psift 64": [technique, tr.Collect(to=f"{folder}/64", curvature="identity", size=64)],
            }
            runs = {side: tr.compose(model(width), techniques) for side, techniques in sides.items()}
            optimizers = {side: run.optimizer(lr=1e-4) for side, run in runs.items()}
            times: dict[str, list[float]] = {side: [] for side in sides}
            steps = batches()
            for round_ in range(rounds + 1):
                for side, run in runs.items():
                    spent = seconds(run, optimizers[side], steps)
                    if round_:
                        times[side].append(spent / STEPS)
            for side in ("psift 16", "psift 64"):
                yield row(
                    "a step with collection / without", f"{name}, width {width}, {side}", times[side], times["plain"],
                    unit="s", at_most=1.10 if side == "psift 16" else None, packages=("torch", "transformers"),
                    command=COMMAND,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one width, two rounds; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        for entry in rows(2, [256]):
            print(entry.case, entry.ratio)
        return
    write("collect", "cpu2", list(rows(ROUNDS, list(WIDTHS))))


if __name__ == "__main__":
    main()
