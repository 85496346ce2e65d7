"""Callbacks, to which a run reports: the console, metrics.jsonl, any tracker. None can change the run."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from treering.core.errors import CheckpointError

Metrics = Mapping[str, float]


class Callback:
    """The events of a run; override those that you need. They are called on rank 0, with numbers of all ranks.

    An exception in one ends the run: a tracker that may fail without harm must catch its own exceptions.
    """

    def started(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Called before the first step of this process; `facts` holds sizes, the seed and the step to resume after."""

    def stepped(self, metrics: Metrics) -> None:
        """Called after a logged step."""

    def evaluated(self, metrics: Metrics) -> None:
        """Called after an evaluation."""

    def noted(self, text: str) -> None:
        """Called with a message for a person: a skipped step, a checkpoint, a generated sample."""

    def profiled(self, phases: Sequence[Mapping[str, Any]]) -> None:
        """Called with --profile, before `finished`, with the time of each phase of this process as rows of a table."""

    def finished(self, summary: Sequence[Mapping[str, Any]]) -> None:
        """Called once, after the last step; `summary` is the rows of a table."""


class Screen(Protocol):
    """The display that the console callback writes to; the command line has one."""

    def start(self, total_steps: int) -> None: ...
    def step(self, metrics: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def table(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def stop(self) -> None: ...


class Console(Callback):
    """Shows a run on a screen."""

    def __init__(self, screen: Screen):
        self.screen = screen

    def started(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        self.screen.note(" · ".join(f"{name} {value}" for name, value in facts.items()))
        self.screen.start(total_steps)

    def stepped(self, metrics: Metrics) -> None:
        self.screen.step(metrics)

    def evaluated(self, metrics: Metrics) -> None:
        shown = {k: v for k, v in metrics.items() if k != "step"}
        self.screen.note(f"step {metrics['step']:.0f}: " + ", ".join(f"{k} {_short(v)}" for k, v in shown.items()))

    def noted(self, text: str) -> None:
        self.screen.note(text)

    def profiled(self, phases: Sequence[Mapping[str, Any]]) -> None:
        self.screen.stop()
        self.screen.table(phases)

    def finished(self, summary: Sequence[Mapping[str, Any]]) -> None:
        self.screen.stop()
        self.screen.table(summary)


def _short(value: float) -> str:
    """Return a number with four decimals, or three digits where that would leave fewer."""
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"


class JsonLines(Callback):
    """metrics.jsonl: a line per logged step or evaluation. A resumed run appends to the same file.

    A killed run may have reported steps after its last checkpoint, which are then taken again: lines above a `start`
    line about steps later than its "after step" do not count. A number that is not finite is written as null.
    """

    def __init__(self, path: Path):
        self.path = path

    def _write(self, kind: str, metrics: Mapping[str, Any]) -> None:
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **line}) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, before)  # the next line must not be joined to a half one
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}") from None

    def started(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        self._write("start", {"total_steps": total_steps, **facts})

    def stepped(self, metrics: Metrics) -> None:
        self._write("step", metrics)

    def evaluated(self, metrics: Metrics) -> None:
        self._write("evaluation", metrics)

    def noted(self, text: str) -> None:
        self._write("note", {"text": text})
