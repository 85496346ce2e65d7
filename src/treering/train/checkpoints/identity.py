"""What identifies a run, kept in each checkpoint, and what may be changed between a checkpoint and a resume."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError
from treering.core.settings import as_begun as settings_as_begun
from treering.core.settings import with_current_names
from treering.curvature import Statistics
from treering.plan import Plan
from treering.plan.teacher import teacher_of
from treering.store.model_folder import fingerprint
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints import manifest
from treering.train.config import Job
from treering.train.prepare import RunData

TENSORS = ("techniques", "dtype", "initialise", "optimizer")  # if one of these changes, the tensors would not fit
SOURCES = ("model", "weights", "statistics", "seed")  # what prepared results are made from


def identity_of(job: Job, plan: Plan, data: RunData | None, statistics: Statistics | None) -> dict[str, Any]:
    """Return what identifies a run: with any of it changed, a resumed run would be another one.

    Args:
        data: None where a checkpoint is only exported.
        statistics: those that the run begins with, if any.
    """
    settings = job.train
    identity: dict[str, Any] = {
        "model": plan.source_name,
        "techniques": [repr(t) for t in plan.techniques if t.stage.name in ("QUANTIZE", "ADAPT")],
        "dtype": sorted({str(dtype).removeprefix("torch.") for _, dtype in plan.plain.values()}),
        "initialise": job.model.initialise,
        "weights": None if job.model.initialise or plan.folder is None else fingerprint(plan.folder),
        "optimizer": settings.optimizer.name,
        "seed": job.seed,
        "statistics": None if statistics is None else statistics.digest,
        **_taught(plan),
    }
    if data is not None:
        identity |= {
            "data": data.examples.digest,
            "tokens_per_step": data.tokens_per_step,
            "max_length": job.data.max_length,
            "packing": data.packing,
            "shuffle": job.data.shuffle,
        }
    return json.loads(json.dumps(identity))


def _taught(plan: Plan) -> dict[str, Any]:
    """Return what identifies an objective with a teacher, and its weights: a folder that was moved is the same one."""
    objective, teacher = plan.objective, teacher_of(plan.objective)
    if teacher is None:
        return {"objective": None, "teacher": None}
    settings = [f"{name}={value!r}" for name, value in sorted(vars(objective).items()) if name != "teacher"]
    folder = None if plan.teacher is None else plan.teacher.folder
    return {
        "objective": " ".join((type(objective).__name__, *settings)),
        "teacher": teacher if folder is None else fingerprint(folder),
    }


def as_begun(job: Job) -> tuple[Job, list[str]]:
    """Return the job as the run in its output folder began, where defaults have changed since, and what is other."""
    texts = _techniques_of_newest(Path(job.output) / "checkpoints")
    techniques, notes = [], []
    for technique in job.techniques:
        kind = type(technique).__name__
        own = [text for text in texts if isinstance(text, str) and text.startswith(f"{kind}(")]
        begun = settings_as_begun(technique, own[0]) if len(own) == 1 else technique
        if repr(begun) != repr(technique):
            notes.append(f"{kind.lower()} resumes as this run began, not with today's defaults: {begun!r}")
        techniques.append(begun)
    return (replace(job, techniques=tuple(techniques)), notes) if notes else (job, notes)


def _techniques_of_newest(root: Path) -> list[Any]:
    """Return the settings that the newest readable manifest has, as texts; damage is reported where it is read."""
    for step in reversed(checkpoint.steps(root)):
        with suppress(CheckpointError, OSError):
            return list(manifest.load(root / f"step-{step}").facts.get("identity", {}).get("techniques", ()))
    return []


def check_same(
    saved: checkpoint.SavedCheckpoint, now: Mapping[str, Any], techniques: Iterable[object], force: bool = False
) -> list[str]:
    """Refuse to resume as another run. With `force`, return notes on changes that leave the tensors as they are.

    Args:
        techniques: of this run: an earlier version may have written a setting's former name.
    """
    then = dict(saved.facts.get("identity", {}))
    for technique in techniques:
        then["techniques"] = [with_current_names(type(technique), text) for text in then.get("techniques", ())]
    notes = []
    for name, value in now.items():
        if then.get(name) == value:
            continue
        text = f"{saved.folder} was made with another {name}: {then.get(name)!r}, and this run has {value!r}"
        if force and name not in TENSORS:
            notes.append(f"forced: {text}")
            continue
        remedy = "Restore the setting, or give the new run another output folder"
        raise CheckpointError(f"{text}. {remedy}" + ("" if name in TENSORS else "; --force resumes all the same"))
    return notes


def changed_sources(saved: checkpoint.SavedCheckpoint, now: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which of the things that prepared results are made from are not those of the checkpoint."""
    then = saved.facts.get("identity", {})
    return tuple(name for name in SOURCES if then.get(name) != now[name])
