"""Where the time of a step goes, for --profile. Off, it costs nothing and waits for nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from treering.train.ranks.heartbeat import Phase


class Stopwatch:
    """with watch("forward"): …   A phase that lies inside another is not counted twice: keep them side by side."""

    def __init__(self, on: bool, device: torch.device, phase: Phase | None = None):
        self.on, self.device = on, device
        self.at = phase or Phase()  # always kept: it is what other ranks are told when this one is missed
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.at.name = phase
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
        whole = sum(self.seconds.values()) or 1.0
        return [
            {
                "phase": phase,
                "ms a step": round(1000 * spent / max(1, steps), 2),
                "share": f"{100 * spent / whole:.1f} %",
            }
            for phase, spent in self.seconds.items()
        ]
