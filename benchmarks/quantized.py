"""What quantizing costs a published model, and what the starts of adapters bring back before any training.

    python -m benchmarks.quantized --model DIR       SmolLM2-135M-Instruct, for example

Bits a byte of a held-out page of our documentation. Another page is measured for the start `activation`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

import treering as tr
from benchmarks.rows import Row, row, write

DOCS = Path(__file__).parent.parent / "docs"
PACKAGES = ("torch", "transformers")
FORMATS: dict[str, dict[str, Any]] = {"int3": {"group": 32}, "nvfp4": {}}
RANK, LENGTH, MEASURED, HELD_OUT = 16, 256, 16, 1024  # the last three in tokens; MEASURED rows of LENGTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    command = "python -m benchmarks.quantized --model " + Path(options.model).name
    held_out = torch.tensor([tokenizer((DOCS / "checkpoints.md").read_text("utf-8"))["input_ids"][:HELD_OUT]])
    size = len(tokenizer.decode(held_out[0]).encode())

    @torch.no_grad()
    def bits(run: Any) -> float:
        logits = run.model.eval()(input_ids=held_out, use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, held_out[0, 1:], reduction="sum")) / math.log(2) / size

    base = tr.compose(options.model, [], frozen=True, dtype="float32")
    original = bits(base)
    ids = tokenizer((DOCS / "concepts.md").read_text("utf-8"))["input_ids"]
    rows_ = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)][:MEASURED]
    statistics = tr.measure(base, [{"input_ids": torch.tensor([one])} for one in rows_])
    del base
    measured = sum(map(len, rows_))
    rows: list[Row] = []
    for name, settings in FORMATS.items():
        lost = 0.0
        for init in ("kaiming_zeros", "residual", "activation"):
            adapter = tr.LoRA(rank=RANK, init=init)  # type: ignore[arg-type]
            quantize = tr.Quantize(format=name, **settings)  # type: ignore[arg-type]
            run = tr.compose(options.model, [quantize, adapter], dtype="float32", statistics=statistics)
            gap = bits(run) - original
            lost = lost or gap
            case = f"{name}, rank {RANK} on every linear, start {init}, {measured} tokens measured"
            peer = [] if init == "kaiming_zeros" else [lost]
            figure = "bits a byte lost by quantizing" + (" / without the start" if peer else "")
            rows.append(row(figure, case, [gap], peer, unit="bits", packages=PACKAGES, command=command))
            del run
    write("quantized", "cpu2", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
