"""Turns what happened into numbers and tells the callbacks. Sums over ranks are made here, once a logged step."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treering.errors import CheckpointError
from treering.plan import Plan, Run, StepReport
from treering.train.callbacks import Callback, JsonLines
from treering.train.job import Job
from treering.train.keeper import Keeper
from treering.train.prepare import RunData
from treering.train.stopwatch import Stopwatch


class Teller:
    def __init__(self, job: Job, plan: Plan, callbacks: Sequence[Callback]):
        self.job, self.plan = job, plan
        self.folder = Path(job.output)
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.callbacks: list[Callback] = []
        self.steps = 0  # taken by this process
        self.begun = self.since = time.monotonic()
        self.tokens = 0.0  # since the last logged step
        self.last: dict[str, float] = {}
        if self.first:
            self._make_folder()
            self.callbacks = [*callbacks, JsonLines(self.folder / "metrics.jsonl")]

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.job.written:
                (self.folder / "config.yaml").write_text(self.job.written, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"the output folder {self.folder} cannot be written: {error.strerror}") from None

    def note(self, text: str) -> None:
        for callback in self.callbacks:
            callback.noted(text)

    def started(self, run: Run, data: RunData, start: int, seconds: float) -> None:
        if start:
            self.note(f"goes on after step {start}")
        report = data.examples.report
        for kind, number in {"truncated": report.truncated, "dropped": report.dropped, **report.skipped}.items():
            if number:
                self.note(f"data: {number} {kind}")
        facts = {
            "model": self.plan.source_name,
            "trained": f"{sum(p.numel() for _, p in run.trainable()):,} parameters",
            "documents": f"{len(data.examples):,} ({report.format})",
            "packing": data.packing,
            "full": f"{100 * data.fill:.1f} %",
            "ready": f"after {seconds:.1f} s",
        }
        for callback in self.callbacks:
            callback.started(data.steps, facts)
        self.begun = self.since = time.monotonic()

    def stepped(
        self,
        step: int,
        loss: torch.Tensor,
        batches: Sequence[Mapping[str, Any]],
        learning_rate: float,
        report: StepReport,
        last: bool,
    ) -> None:
        self.steps += 1
        self.tokens += sum(batch["input_ids"].numel() for batch in batches)
        if report.skipped:
            samples = [name for batch in batches for name in batch.get("samples", ())]
            self.note(f"step {step} was skipped: its gradient is not finite (samples {', '.join(samples[:8])})")
        if not (last or step % self.job.train.log_every == 0 or self.steps == 1):
            return
        summed = torch.stack([loss.double(), torch.tensor(self.tokens, device=loss.device, dtype=torch.float64)])
        if dist.is_initialized():
            dist.all_reduce(summed)
            summed /= dist.get_world_size() / self.plan.data_ranks
        now = time.monotonic()
        self.last = {
            "step": step,
            "loss": float(summed[0]),
            "lr": learning_rate,
            "norm": report.norm,
            "tokens_per_second": float(summed[1]) / max(now - self.since, 1e-9),
            "memory": float(memory(self.plan.device)),
        }
        self.since, self.tokens = now, 0.0
        for callback in self.callbacks:
            callback.stepped(self.last)

    def evaluated(self, step: int, held_out: float) -> None:
        for callback in self.callbacks:
            callback.evaluated({"step": float(step), "held_out_loss": held_out})

    def sampled(self, prompts: Sequence[str], made: Sequence[str]) -> None:
        for prompt, text in zip(prompts, made):
            self.note(f"{prompt}\n    → {text}")

    def saved(self, path: Path) -> None:
        self.note(f"saved {path}")

    def finished(self, keeper: Keeper, watch: Stopwatch) -> dict[str, Any]:
        spent = time.monotonic() - self.begun
        summary: dict[str, Any] = {
            "steps": int(self.last.get("step", 0)),
            "loss": self.last.get("loss"),
            "best held-out loss": keeper.counts["best"],
            "skipped": keeper.counts["skipped"],
            "seconds": round(spent, 1),
        }
        rows = [{"run": name, "": f"{value:g}"} for name, value in summary.items() if value is not None]
        for callback in self.callbacks:
            callback.finished(rows)
        if watch.on:
            timed = watch.rows(self.steps)
            if self.first:
                (self.folder / "profile.json").write_text(json.dumps(timed, indent=2), encoding="utf-8")
            for callback in self.callbacks:
                callback.finished(timed)
        return summary


def memory(device: torch.device) -> int:
    """Peak bytes on the device, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
