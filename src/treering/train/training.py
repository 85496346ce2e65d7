"""One run of the trainer in this process, as a value, and a stopwatch for its phases."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from treering.plan import Run
from treering.train.checkpoints.manager import CheckpointManager
from treering.train.config import Job
from treering.train.prepare import RunData
from treering.train.ranks.heartbeat import Phase
from treering.train.ranks.watchdog import Watchdog
from treering.train.reporter import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stopwatch:
    """Seconds spent in each phase, for --profile. Switched off, it only records the name of the phase.

    `with stopwatch("forward"): …`. Phases must not be nested: the inner one would be counted twice.
    """

    def __init__(self, on: bool, device: torch.device, phase: Phase):
        self.on, self.device = on, device
        self.phase = phase  # always set: it is what other ranks report when this one does not answer
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase.name = phase
        if not self.on:
            yield
            return
        begin = self._now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run on after their launch: without this, all is "step"
        return time.perf_counter()

    def rows(self, steps: int) -> list[dict[str, object]]:
        """Return a table: a row for each phase, with its time per step and its share of the sum."""
        total = sum(self.seconds.values()) or 1.0
        return [
            {
                "phase": phase,
                "ms a step": round(1000 * spent / max(1, steps), 2),
                "share": f"{100 * spent / total:.1f} %",
            }
            for phase, spent in self.seconds.items()
        ]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The objects that the loop, the evaluation and the measurement at the end share."""

    job: Job
    run: Run
    data: RunData
    tokenizer: "PreTrainedTokenizerBase"
    optimizers: Sequence[Optimizer]
    checkpoints: CheckpointManager
    reporter: Reporter
    stopwatch: Stopwatch
    watchdog: Watchdog
