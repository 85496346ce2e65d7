"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from treering.train.config import Schedule


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The factor on the peak learning rate for step `step` (0-based) of `steps`.

    Warm-up is linear and never 0: the first step would be lost. The last step lands just above `final`.
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
