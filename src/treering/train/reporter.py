"""Numbers about a run for the callbacks. Sums over ranks are taken here, once per logged step."""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treering.core.collectives import together
from treering.data.examples import Examples
from treering.data.order import Order
from treering.plan import Plan, Run, StepReport
from treering.plan.explain import unused
from treering.train.callbacks import Callback, JsonLines
from treering.train.checkpoints.manager import Progress
from treering.train.config import Job
from treering.train.prepare import RunData


class StepSamples:
    """The documents and tokens that a step trains on, over all ranks.

    Steps are asked for in ascending order, so that the epochs before are not counted again each time.
    """

    def __init__(self, examples: Examples, order: Order):
        self.examples, self.order = examples, order
        self.epoch = self.first = 0  # the epoch of the step asked for last, and the first step of that epoch

    def documents(self, step: int) -> list[int]:
        """Return the numbers of the documents of `step` (0-based)."""
        while step - self.first >= (steps := self.order.steps_in_epoch(self.epoch)):
            self.epoch, self.first = self.epoch + 1, self.first + steps
        return [i for documents in self.order.bins(self.epoch, step - self.first) for i in documents]

    def tokens(self, step: int) -> int:
        """Return the number of tokens of all documents, without padding."""
        return int(self.examples.lengths[self.documents(step)].sum())

    def names(self, step: int) -> list[str]:
        """Return the sample ids, for messages."""
        return [self.examples.sample_id(i) for i in self.documents(step)]


class Reporter:
    """Reports a run to its callbacks, on rank 0. Every rank calls every method: some are collectives."""

    def __init__(self, job: Job, plan: Plan, callbacks: Sequence[Callback]):
        self.job, self.plan = job, plan
        self.folder = Path(job.output)
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.callbacks: list[Callback] = []
        self.steps = 0  # taken by this process
        self.at = 0  # the last step that was taken
        self.begun = time.monotonic()
        self.seconds = 0.0  # of training since the last logged step: evaluating and saving do not count
        self.tokens = 0  # since the last logged step
        self.last: dict[str, float] = {}
        together(lambda: self.folder.mkdir(parents=True, exist_ok=True), f"making the output folder {self.folder}")
        if self.first:
            self.callbacks = [*callbacks, JsonLines(self.folder / "metrics.jsonl")]

    def note(self, text: str) -> None:
        """Report a message for a person."""
        for callback in self.callbacks:
            callback.noted(text)

    def started(self, run: Run, data: RunData, start: int, seconds: float) -> None:
        """Keep the configuration, and report what begins after step `start`, ready `seconds` after the process."""
        together(
            lambda: keep_config(self.folder, self.job.written, start) if self.first else None, "keeping config.yaml"
        )
        self.run, self.samples, self.at = run, StepSamples(data.examples, data.train.order), start
        if start:
            self.note(f"resumes after step {start}")
        warnings = [warning for applied in self.plan.applied for warning in applied.warnings]
        for text in filter(
            None, (unused(self.plan), *self.plan.notes, *warnings, *run.notes, *data.notes, *_coarse(run))
        ):
            self.note(text)
        facts = {
            "model": self.plan.source_name,
            "trained": f"{sum(p.numel() for _, p in run.trainable()):,} parameters",
            "documents": f"{len(data.examples):,} ({data.examples.report.format})",
            "packing": data.packing,
            "full": f"{100 * data.fill:.1f} %",
            "seed": self.job.seed,
            "after step": start,
            "ready": f"after {seconds:.1f} s",
        }
        for callback in self.callbacks:
            callback.started(data.steps, facts)
        self.begun = self.since = time.monotonic()

    def stepped(self, step: int, loss: torch.Tensor, learning_rate: float, report: StepReport, *, log: bool) -> None:
        """Report a step; `loss` is this rank's share, and `log` is whether callbacks get it."""
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        self.steps += 1
        self.at = step
        self.tokens += self.samples.tokens(step - 1)
        if report.skipped and self.first:
            samples = self.samples.names(step - 1)
            named = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
            self.note(f"step {step} was skipped: its gradient is not finite (samples {named})")
        if log or self.steps == 1:
            self._log(step, loss, learning_rate, report)
        self.since = time.monotonic()

    def _log(self, step: int, loss: torch.Tensor, learning_rate: float, report: StepReport) -> None:
        used = torch.tensor(memory(self.plan.device), dtype=torch.float64, device=loss.device)
        if dist.is_initialized():
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
        self.last = {
            "step": step,
            "loss": float(self.run.total(loss)),
            "lr": learning_rate,
            "norm": report.norm,
            "tokens": self.tokens,  # since the last line, of all ranks
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "memory": float(used),  # of the rank that needs most
            **self.run.metrics(),
        }
        self.seconds, self.tokens = 0.0, 0
        for callback in self.callbacks:
            callback.stepped(self.last)

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Report means over held-out documents: `loss`, and what the objective has besides."""
        others = {name: value for name, value in scores.items() if name != "loss"}
        for callback in self.callbacks:
            callback.evaluated({"step": float(step), "held_out_loss": scores["loss"], **others})

    def sampled(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Report what was generated for each prompt."""
        for prompt, text in zip(prompts, texts):
            self.note(f"{prompt}\n    → {text}")

    def resume_clock(self) -> None:
        """Count time as training again; the time since the last step was evaluation or saving."""
        self.since = time.monotonic()

    def finished(self, progress: Progress, phases: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """Report the end of the run, and the `phases` of a profile if any. Returns the facts of the summary."""
        spent = time.monotonic() - self.begun
        summary: dict[str, Any] = {
            "steps": self.at,
            "loss": self.last.get("loss"),
            "best held-out loss": progress.best,
            "skipped": progress.skipped,
            "seconds": round(spent, 1),
        }
        if phases is not None:
            if self.first:
                (self.folder / "profile.json").write_text(json.dumps(phases, indent=2), encoding="utf-8")
            for callback in self.callbacks:
                callback.profiled(phases)
        rows = [{"run": name, "": _written(value)} for name, value in summary.items() if value is not None]
        for callback in self.callbacks:
            callback.finished(rows)
        return summary


def keep_config(folder: Path, text: str, start: int) -> None:
    """Write the configuration of this start as config.yaml; a different one that was there is kept next to it."""
    path = folder / "config.yaml"
    if not text or (path.exists() and path.read_text(encoding="utf-8") == text):
        return
    temporary = folder / ".config.yaml.tmp"
    temporary.write_text(text, encoding="utf-8")
    if path.exists():
        names = (
            folder / f"config.until-step-{start}{extra}.yaml" for extra in ("", *(f".{i}" for i in range(2, 10**6)))
        )
        os.rename(path, next(name for name in names if not name.exists()))
    os.replace(temporary, path)


def _coarse(run: Run) -> list[str]:
    """Return a warning where parameters are trained in bfloat16, which loses small changes."""
    coarse = [p for _, p in run.trainable() if p.dtype == torch.bfloat16]
    if not coarse:
        return []
    return [
        f"{len(coarse)} of {len(run.trainable())} trained parameters are bfloat16: a change below 1/256 of a weight "
        "is lost. model.dtype: float32 keeps it (with shard, compute: bfloat16 leaves the arithmetic as it is)"
    ]


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def memory(device: torch.device) -> int:
    """Return the peak of bytes on the device, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
