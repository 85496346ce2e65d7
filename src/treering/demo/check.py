"""The last act: what was exported is what was trained, bit for bit, in plain transformers."""

from typing import Any

import torch

from treering.demo.acts import Stage, load_plain
from treering.train.config import Job
from treering.train.export import reopen


def check(stage: Stage, job: Job) -> None:
    run: Any = reopen(job)
    run.model.eval()
    model, tokenizer = load_plain(stage.root / "model")
    ids = tokenizer("def main():\n    return None", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        same = torch.equal(model(ids).logits, run.model(ids).logits)
    stage.bar(same, "the exported model's logits are bitwise those of the run")
