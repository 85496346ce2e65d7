"""The act of the demo in which a mixture of experts is stored in 4 bits and learns back what rounding lost."""

from pathlib import Path
from typing import Any, Literal

import torch

from treering.demo.acts import DemoStage, write_config
from treering.demo.material import make_mixture, texts_of
from treering.demo.scores import load_plain
from treering.plan import Run, compose
from treering.techniques import Quantize
from treering.train.config import Job
from treering.train.export import reopen

FORMAT: Literal["nvfp4"] = "nvfp4"
PRETRAIN = """\
# A mixture of 8 experts, 1.2 M parameters, from random weights, on the same text.
model: {{path: "{root}/blank-mixture", initialise: true, dtype: float32}}
data: {{train: "{root}/corpus/train.jsonl", format: text, max_length: 512, cache: "{root}/tokens"}}
techniques:
  full:
train:
  steps: {steps}
  tokens_per_step: 1024
  log_every: 20
  optimizer: {{name: muon, lr: 1.0e-2}}
  schedule: {{name: cosine, warmup: 20}}
output: "{root}/pretrain-mixture"
"""
DISTIL = """\
# The mixture in 4 bits, with adapters on attention and every expert that learn the probabilities of the original.
model: {{path: "{root}/mixture", dtype: float32}}
data: {{train: "{root}/corpus/train.jsonl", format: text, max_length: 512, cache: "{root}/tokens"}}
statistics: {{path: "{root}/known-mixture", tokens: 0}}
techniques:
  quantize: {{format: {format}}}
  lora: {{rank: 8, init: activation}}
objective:
  distill: {{teacher: "{root}/mixture"}}
train:
  steps: {steps}
  tokens_per_step: 1024
  log_every: 20
  optimizer: {{name: adamw, lr: 5.0e-4}}
  schedule: {{name: cosine, warmup: 5}}
output: "{root}/distil"
"""


def mend(stage: DemoStage, job_of_file: Any) -> None:
    """Pretrain a small mixture, store it in 4 bits, and distil it back; show which share of the damage is gone."""
    text = stage.root / "corpus" / "train.jsonl"
    mixture, known = stage.root / "mixture", stage.root / "known-mixture"
    make_mixture(stage.root / "blank-mixture", stage.root / "blank")
    file = write_config(stage, "mixture.yaml", PRETRAIN, steps=stage.mixture_steps)
    stage.command("treering", "train", file)
    stage.train(file)
    stage.export(stage.root / "pretrain-mixture", mixture)
    stage.command("treering", "measure", mixture, "--data", text, "--max-length", 256, "--to", known)
    stage.measure(str(mixture), known, [str(text)])
    file = write_config(stage, "distil.yaml", DISTIL, steps=stage.distil_steps, format=FORMAT)
    stage.command("treering", "train", file)
    stage.train(file)
    job: Job = job_of_file(file)
    held_out = texts_of(stage.root / "corpus" / "held_out.jsonl")
    quantized, distilled = (divergence(run.model, mixture, held_out) for run in (in_few_bits(mixture), reopen(job)))
    rows = [
        {"": name, "KL to the original, nats per token": f"{kl:.4f}", "same most likely token": f"{same:.1%}"}
        for name, (kl, same) in ((f"in {FORMAT}", quantized), ("distilled", distilled))
    ]
    stage.table(rows)
    share = 1 - distilled[0] / quantized[0]
    stage.bar(share >= 0.5, f"distillation recovered {share:.0%} of what storing the mixture in 4 bits had changed")


def in_few_bits(folder: Path) -> Run:
    """Return the quantized model without adapters."""
    return compose(str(folder), [Quantize(format=FORMAT)], frozen=True)


@torch.no_grad()
def divergence(model: Any, original: Path, texts: list[str]) -> tuple[float, float]:
    """Return the mean KL(original ‖ model) over tokens of texts, and how often the most likely token is the same."""
    teacher, tokenizer = load_plain(original)
    model.eval()
    kl, same, tokens = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        wanted, given = (one(input_ids=ids, use_cache=False).logits[0].log_softmax(-1) for one in (teacher, model))
        kl += float(torch.nn.functional.kl_div(given, wanted, reduction="sum", log_target=True))
        same += int((given.argmax(-1) == wanted.argmax(-1)).sum())
        tokens += ids.shape[1]
    return kl / tokens, same / tokens
