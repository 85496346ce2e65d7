"""Keeps a run: its checkpoints, what must not change between them, and which is the best."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from treering.errors import CheckpointError
from treering.plan import Plan, Run, StepReport, load
from treering.train import checkpoint, state
from treering.train.job import Job
from treering.train.prepare import RunData


class Keeper:
    def __init__(self, job: Job, plan: Plan, data: RunData | None):
        self.job, self.plan, self.data = job, plan, data
        self.root = Path(job.output) / "checkpoints"
        self.saved: checkpoint.Saved | None = None
        self.counts: dict[str, Any] = {"skipped": 0, "best": None, "best_step": None, "without_improvement": 0}

    def load(self, warn: Callable[[str], None]) -> Run:
        """First values, or those of the newest whole checkpoint of this output folder."""
        newest = checkpoint.newest(self.root, warn)
        if newest is not None and self.job.train.checkpoint.resume == "never":
            raise CheckpointError(
                f"{self.root} holds checkpoints up to step {newest.step}, and train.checkpoint.resume is never; "
                "give this run another output folder, or set resume to auto"
            )
        prepared = Path(self.job.output) / "prepared"
        if newest is None:
            return load(self.plan, prepared=prepared)
        self._check_same(newest)
        self.saved = newest
        return load(self.plan, resume=newest.tensors)

    def restore(self, run: Run, optimizers: Sequence[Optimizer]) -> int:
        """The optimizers' state and the counts; returns the step to go on from."""
        if self.saved is None:
            return 0
        state.restore_optimizers(run, optimizers, self.saved.tensors)
        self.counts |= self.saved.facts["counts"]
        run.number = self.saved.step
        run.skipped_in_a_row = self.counts.get("skipped_in_a_row", 0)
        return self.saved.step

    def took(self, report: StepReport) -> None:
        self.counts["skipped"] += report.skipped
        self.counts["skipped_in_a_row"] = self.counts.get("skipped_in_a_row", 0) + 1 if report.skipped else 0

    def judge(self, step: int, held_out: float) -> None:
        best = self.counts["best"]
        if best is None or held_out < best:
            self.counts |= {"best": held_out, "best_step": step, "without_improvement": 0}
        else:
            self.counts["without_improvement"] += 1

    def wants(self, step: int) -> bool:
        """Whether `step` has just been judged the best, and the best is to be saved."""
        return self.job.train.checkpoint.best and self.counts["best_step"] == step

    def patience_is_over(self) -> bool:
        patience = self.job.train.evaluate.patience
        return patience is not None and self.counts["without_improvement"] >= patience

    def save(self, run: Run, optimizers: Sequence[Optimizer], step: int) -> Path:
        path = self.root / f"step-{step}"
        if self.saved is not None and self.saved.step == step:
            return path  # resumed at the end: nothing has changed
        tensors = state.tensors(run, optimizers)
        made = checkpoint.save(self.root, step, tensors, {"identity": self.identity(), "counts": self.counts})
        if not dist.is_initialized() or dist.get_rank() == 0:
            checkpoint.prune(self.root, self.job.train.checkpoint.keep, self._best_kept(step))
        return made

    def _best_kept(self, step: int) -> int | None:
        """The best evaluated step if it was saved; it is then spared when old checkpoints go."""
        best = self.counts["best_step"]
        return best if best is not None and (self.root / f"step-{best}").is_dir() else None

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: going on with any of it changed would be another one."""
        settings = self.job.train
        found: dict[str, Any] = {
            "model": self.plan.source_name,
            "techniques": [repr(t) for t in self.plan.techniques if t.stage.name in ("QUANTIZE", "ADAPT")],
            "optimizer": settings.optimizer.name,
            "seed": self.job.seed,
        }
        if self.data is not None:
            found |= {
                "data": self.data.examples.digest,
                "tokens_per_step": self.data.tokens_per_step,
                "max_length": self.job.data.max_length,
                "packing": self.data.packing,
                "shuffle": self.job.data.shuffle,
            }
        return json.loads(json.dumps(found))

    def _check_same(self, saved: checkpoint.Saved) -> None:
        now, then = self.identity(), saved.facts.get("identity", {})
        for name, value in now.items():
            if then.get(name) != value:
                raise CheckpointError(
                    f"{saved.folder} was made with another {name}: {then.get(name)!r}, and this run has {value!r}. "
                    "Restore the setting, or give the new run another output folder"
                )
