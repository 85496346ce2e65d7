"""What `treering plan` says of ranks that share rows: against real ranks, how fast, and the fewest cards for a row.

    python -m benchmarks.ulysses_plan [--quick] [--machine cpu2]

The long row is Qwen3-8B at 1,048,576 tokens, bfloat16, every parameter trained: weights, gradients, optimizer and the
inputs of blocks in host memory, blocks and loss in tiles. A card has 80 · 10⁹ bytes here, of which the forecast takes
1 GiB for the driver and 1 GiB for messages; published for 8 cards with the same switches: 56.2 GB a card.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import treering as tr
from benchmarks.rows import Row, row, write
from tests.plan.memory_toys import CPU, llama_8b, subject
from tests.plan.test_memory_sequence import LENGTH, TECHNIQUES, measured
from tests.plan.test_memory_sequence import run as shared_run
from tests.ranks import on_ranks
from treering.memory import Forecast, forecast

COMMAND = "python -m benchmarks.ulysses_plan"
PACKAGES = ("treering", "torch", "transformers")
CARD = 80e9
LONG = 1_048_576
MOST = 8  # cards that are tried
RUN = """\
model: {{path: {folder}, dtype: float32}}
data: {{train: none.jsonl, max_length: 131072}}
mesh: {{shard: -1, sequence: 8}}
techniques: {{full: , ulysses: , recompute: , tiledblock: , tiledloss: , shard: {{compute: bfloat16}}}}
output: {folder}/run
"""


def qwen3_8b() -> hf.Qwen3Config:
    """Return the published sizes, with as many positions as the row has tokens."""
    return hf.Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=LONG, tie_word_embeddings=False,
    )  # fmt: skip


def planned(layout: str, cards: int) -> Forecast:
    """Return the forecast of the long row over `cards`."""
    shared: list[Any] = [tr.Ulysses(layout=layout)] if cards > 1 else []  # type: ignore[arg-type]
    techniques = [
        tr.Full(),
        tr.TiledBlock(),
        tr.TiledLoss(),
        tr.Recompute(offload="cpu"),
        *shared,
        tr.Shard(offload="cpu"),
    ]
    sizes = {"shard": 1, "sequence": cards}
    return forecast(subject(qwen3_8b(), techniques, world=cards, sizes=sizes, dtype=torch.bfloat16), LONG)


def fewest() -> Iterator[Row]:
    for layout in ("heads", "gathered"):
        for cards in range(1, MOST + 1):
            foreseen = planned(layout, cards)
            peak = foreseen.at(LONG)
            if peak.device <= CARD:
                break
        else:
            raise SystemExit(f"{layout}: not on {MOST} cards")
        case = f"{layout}, everything in host memory and in tiles"
        yield row(
            "fewest 80 GB cards, Qwen3-8B, 1,048,576 tokens (plan)", case, [cards],
            unit="cards", at_most=2 if layout == "heads" else None, packages=PACKAGES, command=COMMAND,
        )  # fmt: skip
        for name, size, most in (
            ("memory of each card", peak.device, CARD / 2**30),
            ("host memory of all ranks together", peak.host * cards, None),
        ):
            yield row(
                f"{name}, Qwen3-8B, 1,048,576 tokens (plan)", f"{layout}, {cards} cards", [size / 2**30],
                unit="GiB", at_most=most, packages=PACKAGES, command=COMMAND,
            )  # fmt: skip
        yield row(
            "longest row that fits, Qwen3-8B, 80 GB cards (plan)", f"{layout}, {cards} cards",
            [foreseen.longest(CARD)], unit="tokens", at_least=LONG, packages=PACKAGES, command=COMMAND,
        )  # fmt: skip
    yield row(
        "memory of each card, Qwen3-8B, 1,048,576 tokens (plan)", "heads, 8 cards (published, measured: 56.2 GB)",
        [planned("heads", 8).at(LONG).device / 2**30], unit="GiB", packages=PACKAGES, command=COMMAND,
    )  # fmt: skip


def against_real_ranks() -> Iterator[Row]:
    cases = [(layout, name, 2) for layout in ("heads", "gathered") for name in TECHNIQUES]
    held = on_ranks(2, measured, cases, LENGTH)
    for case, *peaks in zip(cases, *held):
        foreseen = forecast(shared_run(*case), LENGTH, device=CPU).at(LENGTH).device
        yield row(
            "predicted peak / real peak, toy width, 2 ranks share rows", ", ".join(case[:2]),
            [foreseen / 2**20], [max(peaks) / 2**20],
            unit="MiB", at_least=0.95, at_most=1.05, packages=PACKAGES, command=COMMAND,
        )  # fmt: skip


def speed(runs: int) -> Iterator[Row]:
    """CPU seconds of messages, times, meshes and the schedule, without the traces of memory."""
    from treering.cli.config import load
    from treering.cli.plan import _meshes, explanation
    from treering.cli.plan_proposals import PlannedRun
    from treering.core.links import Links
    from treering.memory.traffic import schedule_lines

    with tempfile.TemporaryDirectory() as folder:
        llama_8b(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        file = Path(folder) / "run.yaml"
        file.write_text(RUN.format(folder=folder))
        config = load(file, None)

        def everything(ranks: int) -> None:
            explanation(config, ranks, config.data.max_length, Links())
            _meshes(PlannedRun(config=config, ranks=ranks), config.data.max_length, Links(), None, None)
            schedule_lines(ranks)

        everything(8)  # imports
        for ranks in (8, 64, 720, 1024):
            taken = [_seconds(lambda ranks=ranks: everything(ranks)) for _ in range(runs)]
            yield row(
                "treering plan beyond the traces of memory, Llama-8B, 131,072 tokens", f"{ranks} ranks", taken,
                unit="s", at_most=5.0, packages=PACKAGES, command=COMMAND,
            )  # fmt: skip


def _seconds(function: Callable[[], None]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    options = parser.parse_args()
    write(
        "ulysses_plan",
        options.machine,
        [*fewest(), *against_real_ranks(), *speed(1 if options.quick else 3)],
    )


if __name__ == "__main__":
    main()
