"""Small batches and a few steps of training: what most tests of techniques run."""

from typing import Any

import torch
from torch import Tensor

from treering.attention import Documents
from treering.core.seeds import generator
from treering.plan import Run

VOCABULARY = 128


def rows(number: int, lengths: tuple[int, ...] = (12, 7, 12, 3), seed: int = 0) -> list[dict[str, Any]]:
    """`number` micro-batches of one right-padded row each, with unequal numbers of trained tokens."""
    batches = []
    for i in range(number):
        length = lengths[i % len(lengths)]
        ids = torch.randint(3, VOCABULARY, (1, length), generator=generator(seed, "row", i))
        labels = ids.clone()
        labels[:, : 1 + i % 3] = -100
        batches.append({"input_ids": ids, "labels": labels, "samples": [f"row {i}"]})
    return batches


def packed(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """One packed micro-batch."""
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator(seed, "packed", *lengths))
    labels = ids.clone()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    labels[:, starts] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": Documents.of(lengths)}


def train(run: Run, steps: list[list[dict[str, Any]]], kind: Any = torch.optim.SGD, **settings: Any) -> list[float]:
    """Train on `steps`; returns this rank's share of each step's loss."""
    optimizer = run.optimizer(kind, **({"lr": 0.5} | settings))
    losses = []
    for batches in run.steps(steps):
        total = 0.0
        for batch in batches:
            loss = run.loss(batch)
            loss.backward()
            total += float(loss.detach())
        run.step(optimizer)
        losses.append(total)
    return losses


def gradients(run: Run, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole gradients of one step by live name."""
    from treering.core.sharded import gather

    for ready in run.steps([batches]):
        for batch in ready:
            run.loss(batch).backward()
    return {name: gather(p.grad) for name, p in run.trainable() if p.grad is not None}


def weights(run: Run) -> dict[str, Tensor]:
    """Whole plain weights as the techniques hold them."""
    return {name: value.clone() for name, value in run.plain()}
