"""torch's optimizers from their settings, and the learning rate of each step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from treering.core.errors import PlanError
from treering.plan import Run
from treering.train.config import Optimizer as Settings
from treering.train.config import Schedule


def build(run: Run, settings: Settings) -> list[Optimizer]:
    """Return one optimizer, or two for muon: Muon for the matrices inside the blocks, AdamW for the rest."""
    half = [name for name, p in run.trainable() if p.dtype == torch.float16]
    if half:
        raise PlanError(
            f"{half[0]} (and {len(half) - 1} more) would be trained in float16, in which small gradients and their "
            "squares are 0; set model.dtype to float32 or bfloat16",
            settings=("model.dtype",),
        )
    if settings.name == "sgd":
        return [
            run.optimizer(
                torch.optim.SGD, lr=settings.lr, momentum=settings.momentum or 0.0, weight_decay=settings.weight_decay
            )
        ]
    if settings.name == "adamw":
        return [run.optimizer(torch.optim.AdamW, **_adamw(settings))]
    return _muon(run, settings)


def _adamw(settings: Settings) -> dict[str, Any]:
    return {
        "lr": settings.lr,
        "betas": settings.betas or (0.9, 0.95),
        "eps": settings.eps or 1e-8,
        "weight_decay": settings.weight_decay,
        "fused": True,  # one kernel for all parameters, on CUDA and on CPU
    }


def _muon(run: Run, settings: Settings) -> list[Optimizer]:
    inside = {p.name for p in run.plan.anatomy.parameters.values() if p.block is not None}
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in run.trainable():
        (matrices if parameter.ndim == 2 and name in inside else rest).append(parameter)
    if not matrices:
        raise PlanError(
            "muon steps complete matrices of the model's blocks, and none of them is trained; use adamw",
            settings=("train.optimizer.name",),
        )
    if any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in matrices):
        raise PlanError(
            "muon orthogonalises complete matrices, and shard has cut them into rows; use adamw, or one rank",
            settings=("train.optimizer.name", "techniques.shard"),
        )
    # match_rms_adamw gives Muon's update the size of AdamW's, so that one learning rate fits both.
    optimizers: list[Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=settings.lr,
            momentum=0.95 if settings.momentum is None else settings.momentum,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    ]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, **{**_adamw(settings), "weight_decay": 0.0}))
    return optimizers


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Set the learning rate of all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate for step `step` (0-based) of `steps`, a pure function of the step.

    Warm-up is linear and never 0, which would waste the first step. The last step ends just above `final`.
    """
    warmup = _length(schedule.warmup, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        decay = max(1, _length(schedule.decay, steps))
        begin = max(warmup, steps - decay)
        if step < begin:
            return 1.0
        return _down(1 - (step - begin) / max(1, steps - begin), schedule.final)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return _down(0.5 * (1 - math.cos(math.pi * left)) if schedule.name == "cosine" else left, schedule.final)


def _length(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else int(value)


def _down(share: float, final: float) -> float:
    return final + (1 - final) * max(0.0, share)
