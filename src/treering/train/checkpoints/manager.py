"""Keeps a run: its checkpoints, what must not change between them, and which is the best."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from treering.core.collectives import is_first
from treering.core.errors import CheckpointError
from treering.core.settings import with_current_names
from treering.plan import Plan, Run, StepReport, load
from treering.store.model_folder import fingerprint
from treering.train import measurements as rings
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints import state
from treering.train.checkpoints.saver import Saver
from treering.train.job import Job
from treering.train.prepare import RunData

TENSORS = ("techniques", "dtype", "initialise", "optimizer")  # with another of these, the tensors would not fit


class Keeper:
    def __init__(self, job: Job, plan: Plan, data: RunData | None):
        self.job, self.plan, self.data = job, plan, data
        self.statistics = rings.find(job)
        self.root = Path(job.output) / "checkpoints"
        self.saved: checkpoint.Saved | None = None
        self.saver = Saver(job.train.checkpoint.asynchronous)
        self.counts: dict[str, Any] = {"skipped": 0, "best": None, "best_step": None, "without_improvement": 0}

    def load(self, warn: Callable[[str], None]) -> Run:
        """First values, or those of the newest whole checkpoint of this output folder."""
        problems: list[str] = []
        newest = checkpoint.newest(self.root, problems.append)
        for problem in problems:
            warn(problem)
        if newest is None and problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.root} is whole ({problems[0]}). "
                "To start anew, move them away or give this run another output folder"
            )
        if newest is not None and self.job.train.checkpoint.resume == "never":
            raise CheckpointError(
                f"{self.root} holds checkpoints up to step {newest.step}, and train.checkpoint.resume is never; "
                "give this run another output folder, or set resume to auto"
            )
        prepared = Path(self.job.output) / "prepared"
        if newest is None:
            return load(self.plan, statistics=self.statistics, prepared=prepared)
        for note in check_same(newest, self.identity(), self.plan.techniques, force=self.job.train.checkpoint.force):
            warn(note)
        absent = [name for name in self.plan.owned if name not in newest.tensors]
        if absent:
            raise CheckpointError(f"{newest.folder} has no {absent[0]} and {len(absent) - 1} more that this run trains")
        self.saved = newest
        return load(self.plan, statistics=self.statistics, resume=newest.tensors)

    def restore(self, run: Run, optimizers: Sequence[Optimizer]) -> int:
        """The optimizers' state and the counts; returns the step to go on from."""
        if self.saved is None:
            return 0
        state.restore_optimizers(run, optimizers, self.saved.tensors)
        state.restore_techniques(run, self.saved.tensors)
        self.counts |= self.saved.facts["counts"]
        if (
            self._eval() is not None and self.saved.facts.get("eval") != self._eval()
        ):  # a loss on other documents cannot be compared with
            self.counts |= {"best": None, "best_step": None, "without_improvement": 0}
        run.number = self.saved.step
        run.skipped_in_a_row = self.counts.get("skipped_in_a_row", 0)
        return self.saved.step

    def took(self, report: StepReport) -> None:
        self.counts["skipped"] += report.skipped
        self.counts["skipped_in_a_row"] = self.counts.get("skipped_in_a_row", 0) + 1 if report.skipped else 0

    def judge(self, step: int, held_out: float) -> None:
        best = self.counts["best"]
        if math.isfinite(held_out) and (best is None or held_out < best):
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
        mesh = self.plan.mesh
        facts = {
            "identity": self.identity(),
            "counts": dict(self.counts),
            "eval": self._eval(),
            "position": None if self.data is None else self.data.train.position(step),
            "mesh": None if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape)),
            "config": hashlib.sha256(self.job.written.encode()).hexdigest(),
        }
        best, keep = self.counts["best_step"], self.job.train.checkpoint.keep

        def then() -> None:
            if is_first():
                checkpoint.prune(self.root, keep, best, step)

        return self.saver.save(self.root, step, state.tensors(run, optimizers), facts, then)

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written; its error is raised here."""
        self.saver.wait()

    def _eval(self) -> str | None:
        return None if self.data is None or self.data.held_out is None else self.data.held_out.digest

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: going on with any of it changed would be another one."""
        settings = self.job.train
        found: dict[str, Any] = {
            "model": self.plan.source_name,
            "techniques": [repr(t) for t in self.plan.techniques if t.stage.name in ("QUANTIZE", "ADAPT")],
            "dtype": sorted({str(dtype).removeprefix("torch.") for _, dtype in self.plan.plain.values()}),
            "initialise": self.job.model.initialise,
            "weights": None if self.job.model.initialise or self.plan.folder is None else fingerprint(self.plan.folder),
            "optimizer": settings.optimizer.name,
            "seed": self.job.seed,
            "statistics": None if self.statistics is None else self.statistics.digest,
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


def check_same(
    saved: checkpoint.Saved, now: Mapping[str, Any], techniques: Iterable[object], force: bool = False
) -> list[str]:
    """Refuse to go on as another run. With `force`, what leaves the tensors as they are is noted instead."""
    then = dict(saved.facts.get("identity", {}))
    for technique in techniques:  # an earlier version may have written a setting's former name
        then["techniques"] = [with_current_names(type(technique), text) for text in then.get("techniques", ())]
    noted = []
    for name, value in now.items():
        if then.get(name) == value:
            continue
        said = f"{saved.folder} was made with another {name}: {then.get(name)!r}, and this run has {value!r}"
        if force and name not in TENSORS:
            noted.append(f"forced: {said}")
            continue
        remedy = "Restore the setting, or give the new run another output folder"
        raise CheckpointError(f"{said}. {remedy}" + ("" if name in TENSORS else "; --force goes on all the same"))
    return noted
