"""The checkpoints of a run: loading and saving them, the counts they carry, and which one is the best."""

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from treering.core.collectives import is_first
from treering.core.errors import CheckpointError
from treering.curvature import Statistics
from treering.plan import Plan, Run, StepReport, load
from treering.plan.prepared import Prepared
from treering.plan.refill import completed, recorded
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints import state
from treering.train.checkpoints.identity import changed_sources, check_same, identity_of
from treering.train.config import Job
from treering.train.prepare import RunData


@dataclass(kw_only=True)
class Progress:
    """The counts of a run over all its processes; every checkpoint has a copy."""

    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None  # the lowest held-out loss
    best_step: int | None = None
    without_improvement: int = 0  # evaluations since then
    owed: int | None = None  # the step whose evaluation a signal interrupted

    @classmethod
    def restore(cls, saved: checkpoint.SavedCheckpoint) -> "Progress":
        """Return the counts of a checkpoint; one written before a count existed has its first value."""
        counts = saved.facts.get("counts")
        if not isinstance(counts, dict):
            raise CheckpointError(f"{saved.folder} has no counts; it was not saved by the trainer")
        known = {f.name for f in fields(cls)} & counts.keys()
        for name in known:
            value = counts[name]
            number = type(value) in (int, float) if name == "best" else type(value) is int
            number = number and abs(value) < 1 << 63
            if not number and not (value is None and getattr(cls, name) is None):
                raise CheckpointError(f"{saved.folder} has the count {name} = {value!r}, which is not a number")
        return cls(**{name: counts[name] for name in known})

    def record_step(self, report: StepReport) -> None:
        """Count a step that was taken or skipped."""
        self.skipped += report.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0

    def record_loss(self, step: int, held_out: float) -> None:
        """Compare an evaluation with the best one before."""
        if math.isfinite(held_out) and (self.best is None or held_out < self.best):
            self.best, self.best_step, self.without_improvement = held_out, step, 0
        else:
            self.without_improvement += 1

    def forget_best(self) -> None:
        """Forget the best loss: losses on other documents cannot be compared."""
        self.best, self.best_step, self.without_improvement = None, None, 0


class Saver:
    """Writes checkpoints, at once or in a thread while training continues, from a copy in host memory.

    At most one save is in flight; its error is raised by the next `save` or `wait`.
    """

    def __init__(self, asynchronous: bool):
        self.asynchronous = asynchronous
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        # Messages of a save must not mix with those of the training that continues meanwhile.
        self.group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None

    def save(
        self,
        root: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        then: Callable[[], None],
        prepared: Mapping[str, str] | None = None,
    ) -> Path:
        """Save on every rank; `then` runs once the checkpoint is published. Returns the folder."""
        self.wait()
        staged = checkpoint.stage(tensors, copy=self.asynchronous)

        def work() -> None:
            checkpoint.write(root, step, staged, facts, self.group, prepared)
            then()

        if not self.asynchronous:
            work()
        else:
            self.thread = threading.Thread(target=self._guard, args=(work,), name=f"save of step {step}", daemon=True)
            self.thread.start()
        return root / f"step-{step}"

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by `wait`
            self.error = error

    def wait(self) -> None:
        """Wait until nothing is being written; raise the error of a save that failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class CheckpointManager:
    """Opens a run from its newest checkpoint and saves it. Every rank calls every method.

    Args:
        statistics: those that the run begins with, if any.
        data: None where a checkpoint is only exported.
    """

    def __init__(self, job: Job, plan: Plan, data: RunData | None, statistics: Statistics | None = None):
        self.job, self.plan, self.data, self.statistics = job, plan, data, statistics
        self.root = Path(job.output) / "checkpoints"
        self.prepared = Path(job.output) / "prepared"
        self.saved: checkpoint.SavedCheckpoint | None = None
        self.saver = Saver(job.train.checkpoint.asynchronous)
        self.progress = Progress()

    def load(self, note: Callable[[str], None]) -> Run:
        """Return the run with first values, or those of the newest complete checkpoint of the output folder."""
        problems: list[str] = []
        newest = checkpoint.newest(self.root, problems.append)
        for problem in problems:
            note(problem)
        if newest is None and problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.root} is complete ({problems[0]}). "
                "To start anew, move them away or give this run another output folder"
            )
        if newest is not None and self.job.train.checkpoint.resume == "never":
            raise CheckpointError(
                f"{self.root} holds checkpoints up to step {newest.step}, and train.checkpoint.resume is never; "
                "give this run another output folder, or set resume to auto"
            )
        prepared = Prepared(self.prepared)
        if newest is None:
            return load(self.plan, statistics=self.statistics, prepared=prepared, report=note)
        identity = identity_of(self.job, self.plan, self.data, self.statistics)
        for text in check_same(newest, identity, self.plan.techniques, force=self.job.train.checkpoint.force):
            note(text)
        tensors = completed(
            self.plan,
            newest.tensors,
            newest.prepared,
            prepared,
            checkpoint=str(newest.folder),
            statistics=self.statistics,
            changed=changed_sources(newest, identity),
            note=note,
        )
        self.saved = newest
        return load(self.plan, statistics=self.statistics, prepared=prepared, resume=tensors)

    def restore(self, run: Run, optimizers: Sequence[Optimizer]) -> int:
        """Restore the states of optimizers and techniques and the counts. Returns the step after which to resume."""
        if self.saved is None:
            return 0
        state.restore_optimizers(run, optimizers, self.saved.tensors)
        state.restore_techniques(run, self.saved.tensors)
        self.progress = Progress.restore(self.saved)
        if self._eval() is not None and self.saved.facts.get("eval") != self._eval():
            self.progress.forget_best()
        run.number = self.saved.step
        run.skipped_in_a_row = self.progress.skipped_in_a_row
        return self.saved.step

    def wants(self, step: int) -> bool:
        """Return whether `step` has just been evaluated as the best, and the best is to be saved."""
        return self.job.train.checkpoint.best and self.progress.best_step == step

    def patience_is_over(self) -> bool:
        """Return whether training stops early: too many evaluations without improvement."""
        patience = self.job.train.evaluate.patience
        return patience is not None and self.progress.without_improvement >= patience

    def save(
        self, run: Run, optimizers: Sequence[Optimizer], step: int, *, final: bool, note: Callable[[str], None]
    ) -> None:
        """Save `step`. With `on_error: warn` a failure before the `final` save is noted, and training continues."""
        strict = self.job.train.checkpoint.on_error == "stop"
        try:
            self.saver.wait()  # for the previous one, which may still be in progress
        except CheckpointError as error:
            if strict:
                raise
            note(f"{error}; training continues without it")
        try:
            note(f"saved {self._save(run, optimizers, step)}")
            if final:
                self.saver.wait()
        except CheckpointError as error:
            if strict or final:
                raise
            note(f"{error}; training continues without it")

    def _save(self, run: Run, optimizers: Sequence[Optimizer], step: int) -> Path:
        mesh = self.plan.mesh
        facts = {
            "identity": identity_of(self.job, self.plan, self.data, self.statistics),
            "counts": asdict(self.progress),
            "eval": self._eval(),
            "position": None if self.data is None else self.data.train.position(step),
            "mesh": None if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape)),
            "config": hashlib.sha256(self.job.written.encode()).hexdigest(),
        }
        best, keep = self.progress.best_step, self.job.train.checkpoint.keep
        prepared = {} if self.job.train.checkpoint.self_contained else recorded(run)

        def then() -> None:
            if is_first():
                checkpoint.prune(self.root, keep, best, step)

        return self.saver.save(self.root, step, state.tensors(run, optimizers, prepared), facts, then, prepared)

    def _eval(self) -> str | None:
        return None if self.data is None or self.data.held_out is None else self.data.held_out.digest
