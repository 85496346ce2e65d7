"""What `treering plan` says of memory: against steps that really hold it, how fast, and against a published ladder.

    python -m benchmarks.memory [--quick] [--machine cpu2]

The ladder is of one 8B model on one H200, as the authors of long-sequence training on single cards published it: how
long a sequence may be with each switch more. They use fused kernels that we do not, and other byte counts for the
optimizer; what is to be reproduced is the order, and each step's worth.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import treering as tr
from benchmarks.rows import Row, row, write
from tests.plan.memory_toys import CPU, llama_8b, really, subject
from tests.plan.test_memory import CASES, LENGTH
from treering.memory import forecast

COMMAND = "python -m benchmarks.memory"
PACKAGES = ("treering", "torch", "transformers")
H200 = 140.4 * 2**30
AWAY = tr.Shard(compute="bfloat16", offload="cpu")
KEPT = tr.Recompute(offload="cpu")
LADDER = {  # what is on, and the published tokens
    "recompute": ([tr.Recompute()], 65_000),
    "+ tiled loss": ([tr.Recompute(), tr.TiledLoss()], 300_000),
    "+ activations in host memory": ([KEPT, tr.TiledLoss()], 650_000),
    "+ tiled MLP": ([KEPT, tr.TiledLoss(), tr.TiledMLP()], 1_200_000),
    "+ tiled block instead": ([KEPT, tr.TiledLoss(), tr.TiledBlock()], None),
}
RUN = """\
model: {{path: {folder}, dtype: float32}}
data: {{train: none.jsonl, max_length: 32768}}
techniques: {{full: , recompute: , tiledloss: , shard: {{compute: bfloat16}}}}
output: {folder}/run
"""
TOO_LARGE = """\
model: {{path: {folder}, dtype: bfloat16}}
data: {{train: none.jsonl, max_length: 131072}}
techniques: {{full: , shard: {{compute: bfloat16}}}}
output: {folder}/run
"""


def predicted() -> Iterator[Row]:
    for name, (config, techniques, world) in CASES.items():
        made = subject(config, techniques, world=world, on="cpu")
        foreseen, held = forecast(made, LENGTH, device=CPU).at(LENGTH).device, really(made, LENGTH).peak(LENGTH)
        yield row(
            "predicted peak / real peak, toy width", name, [foreseen / 2**20], [held / 2**20],
            unit="MiB", at_least=0.97, at_most=1.03, packages=PACKAGES, command=COMMAND,
        )  # fmt: skip


def speed(runs: int) -> Iterator[Row]:
    """Of the whole command, from its start to its end, in CPU seconds: other programs may run beside it."""
    with tempfile.TemporaryDirectory() as folder:
        llama_8b(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        file = Path(folder) / "run.yaml"
        file.write_text(RUN.format(folder=folder))
        for world in (1, 64, 1024):
            taken = []
            for _ in range(runs):
                before = _children()
                done = [sys.executable, "-m", "treering", "plan", str(file), "--world", str(world), "--gpu", "140GiB"]
                subprocess.run(done, check=True, capture_output=True)
                taken.append(_children() - before)
            yield row(
                "treering plan, Llama-8B, 32k tokens", f"{world} ranks", taken,
                unit="s", at_most=10.0, packages=PACKAGES, command=COMMAND,
            )  # fmt: skip


def speed_of_proposals(runs: int) -> Iterator[Row]:
    """Of a run that does not fit: each proposal is traced, with and without each of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        config = llama_8b(architectures=["LlamaForCausalLM"])
        config.update({**sizes, "head_dim": 128})
        config.save_pretrained(folder)
        file = Path(folder) / "run.yaml"
        file.write_text(TOO_LARGE.format(folder=folder))
        taken = []
        for _ in range(runs):
            before = _children()
            done = [sys.executable, "-m", "treering", "plan", str(file), "--ranks", "8", "--gpu", "80GiB"]
            output = subprocess.run(done, check=True, capture_output=True, text=True).stdout
            assert "would fit with a tiled loss, recompute, tiled blocks" in output
            taken.append(_children() - before)
        yield row(
            "treering plan, Llama-70B, 128k tokens, what would fit", "8 ranks", taken,
            unit="s", at_most=20.0, packages=PACKAGES, command=COMMAND,
        )  # fmt: skip


def _children() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ladder() -> Iterator[Row]:
    before = 0.0
    for name, (techniques, published) in LADDER.items():
        begun = time.process_time()
        longest = forecast(subject(llama_8b(), [tr.Full(), *techniques, AWAY]), 10**6).longest(H200)
        case = f"{name} (published: {published:,}; {time.process_time() - begun:.1f} s)" if published else name
        yield row(
            "longest sequence, Llama-8B, one H200 (plan)", case, [longest],
            unit="tokens", at_least=before, packages=PACKAGES, command=COMMAND,
        )  # fmt: skip
        before = longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    options = parser.parse_args()
    runs = 1 if options.quick else 3
    write("memory", options.machine, [*predicted(), *speed(runs), *speed_of_proposals(runs), *ladder()])


if __name__ == "__main__":
    main()
