"""What distillation brings back of what quantizing a published model lost.

    python -m benchmarks.distill --model DIR [--quick]       SmolLM2-135M-Instruct, for example

Bits a byte of a held-out page of our documentation: of the original, quantized, with adapters at their start, and after
60 steps of 500 tokens of the other pages, in which the adapters learn the original's probabilities. The baseline learns
the labels of the same tokens instead. Quick: one format and 3 steps of 100 tokens, to see that it runs.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import treering as tr
from benchmarks.rows import Row, row, write

ROOT = Path(__file__).parent.parent
HELD_OUT_PAGE = ROOT / "docs" / "checkpoints.md"
PACKAGES = ("torch", "transformers")
FORMATS: dict[str, dict[str, Any]] = {"int3": {"group": 32}, "nf4": {}, "nvfp4": {}}
BAR = {"int3": 0.6}  # of the share of the gap that is recovered
RANK, RATE, WARMUP = 16, 1e-3, 3
SIZES = (60, 500, 1024, 8)  # steps, tokens of each, tokens held out, rows of a step's tokens measured for the start
QUICK = (3, 100, 256, 4)


def pages() -> list[Path]:
    """Return the documentation without the page that is held out and what is printed by programs."""
    printed = {HELD_OUT_PAGE, ROOT / "docs" / "config.md", ROOT / "docs" / "composition.md"}
    found = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "src").rglob("README.md")), ROOT / "README.md"]
    return [page for page in found if page not in printed]


def rows_of(tokenizer: Any, number: int, tokens: int) -> list[torch.Tensor]:
    """Return rows of consecutive tokens, in an order that mixes the pages."""
    ids = torch.tensor([token for page in pages() for token in tokenizer(page.read_text("utf-8"))["input_ids"]])
    whole = list(ids[: len(ids) // tokens * tokens].view(-1, 1, tokens))
    if len(whole) < number:
        raise SystemExit(f"the pages have {len(whole)} rows of {tokens} tokens, and {number} are needed")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    return [whole[i] for i in order[:number]]


class Measure:
    """Bits a byte of the held-out text."""

    def __init__(self, tokenizer: Any, tokens: int):
        self.ids = torch.tensor([tokenizer(HELD_OUT_PAGE.read_text("utf-8"))["input_ids"][:tokens]])
        self.bytes = len(tokenizer.decode(self.ids[0]).encode())

    @torch.no_grad()
    def __call__(self, run: tr.Run) -> float:
        logits = run.model.eval()(input_ids=self.ids, use_cache=False).logits[0, :-1].float()
        run.model.train()
        loss = torch.nn.functional.cross_entropy(logits, self.ids[0, 1:], reduction="sum")
        return float(loss) / math.log(2) / self.bytes


def learn(run: tr.Run, rows: list[torch.Tensor]) -> Iterator[float]:
    """Take a step for each row, and yield its loss: a short warm-up, then a rate that falls to 0."""
    optimizer = run.optimizer(torch.optim.AdamW, lr=RATE)
    steps = [[{"input_ids": ids, "labels": ids}] for ids in rows]
    for step, micro_batches in enumerate(run.steps(steps)):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / len(rows))
        for group in optimizer.param_groups:
            group["lr"] = rate
        (batch,) = micro_batches
        loss = run.loss(batch)
        loss.backward()
        run.step(optimizer, clip=1.0)
        yield float(loss.detach())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--quick", action="store_true", help="one format, 3 steps; writes no results")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    torch.set_num_threads(1)
    steps, tokens, held_out, to_measure = QUICK if options.quick else SIZES
    formats = ["int3"] if options.quick else list(FORMATS)
    command = "python -m benchmarks.distill --model " + Path(options.model).name
    bits = Measure(tokenizer, held_out)
    rows_ = rows_of(tokenizer, steps + to_measure, tokens)
    trained, measured = rows_[:steps], rows_[steps:]
    base = tr.compose(options.model, [], frozen=True, dtype="float32")
    original = bits(base)
    statistics = tr.measure(base, [{"input_ids": ids} for ids in measured])
    del base
    rows: list[Row] = [row("bits a byte", "original", [original], unit="bits", packages=PACKAGES, command=command)]

    def gap_after(name: str, init: str, objective: Any) -> tuple[float, float]:
        """Return bits a byte above the original, at the start and after the steps."""
        techniques = [tr.Quantize(format=name, **FORMATS[name]), tr.LoRA(rank=RANK, init=init)]  # type: ignore[arg-type]
        run = tr.compose(options.model, techniques, dtype="float32", statistics=statistics, objective=objective)
        start = bits(run) - original
        for step, loss in enumerate(learn(run, trained)):
            sys.stderr.write(f"{name} {init}: step {step + 1} of {steps}, loss {loss:.4f}\n")
        return start, bits(run) - original

    for name in formats:
        quantize = tr.Quantize(format=name, **FORMATS[name])  # type: ignore[arg-type]
        lost = bits(tr.compose(options.model, [quantize], frozen=True, dtype="float32")) - original
        case = f"{name}, rank {RANK} on every linear, start activation"
        size = f"{steps} steps of {tokens} tokens"
        start, end = gap_after(name, "activation", tr.Distill(teacher=options.model))
        figures: list[tuple[str, str, float, float | None]] = [
            ("bits a byte lost by quantizing", name, lost, None),
            ("share of the loss recovered by the start", case, 1 - start / lost, None),
            ("share of the loss recovered by distillation", f"{case}, {size}", 1 - end / lost, BAR.get(name)),
        ]
        if name == "int3":
            _, labels = gap_after(name, "activation", None)
            figures.append(("share recovered by the labels alone", f"{case}, {size}", 1 - labels / lost, None))
        for figure, where, value, bar in figures:
            unit = "bits" if figure.startswith("bits") else "share"
            rows.append(row(figure, where, [value], unit=unit, at_least=bar, packages=PACKAGES, command=command))
        if not options.quick:
            write("distill", "cpu2", rows)  # after each format: the next takes half an hour
    if options.quick:
        for one in rows:
            sys.stdout.write(f"{one.figure} | {one.case} | {one.ours:.4g} {one.unit}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
