"""A run's checkpoint as a folder that transformers, or peft, loads."""

import shutil
from dataclasses import replace
from pathlib import Path

from treering.errors import CheckpointError
from treering.plan import Run, load
from treering.plan.export import free
from treering.technique import Stage
from treering.train import checkpoint
from treering.train.job import Job
from treering.train.keeper import Keeper, check_same


def export(job: Job, folder: Path, *, adapter: str | None = None, step: int | None = None) -> Path:
    """Compose the job's model again, fill it from its newest checkpoint (or that of `step`), and write it out."""
    if state := free(folder):  # said before the weights are read
        raise CheckpointError(f"{folder} is {state}; give an export a folder of its own")
    made = reopen(job, step=step).export(folder, adapter=adapter)
    if job.data.template is not None and adapter is None:  # the one it was trained with, not the base model's
        shutil.copy(job.data.template, made / "chat_template.jinja")
    return made


def reopen(job: Job, *, step: int | None = None) -> Run:
    from treering.train.run import draft_of

    root = Path(job.output) / "checkpoints"
    if step is not None:
        if step not in (steps := checkpoint.steps(root)):
            raise CheckpointError(f"{root} has no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        saved: checkpoint.Saved | None = checkpoint.read(root / f"step-{step}")
    else:
        saved = checkpoint.newest(root, _warn)
    if saved is None:
        raise CheckpointError(f"{root} holds no whole checkpoint; train first: treering train {job.output}/config.yaml")
    # What only makes training faster or smaller has no part in the weights, and may not fit this machine.
    lasting = tuple(t for t in job.techniques if t.stage in (Stage.QUANTIZE, Stage.ADAPT))
    job = replace(job, techniques=lasting, mesh={})
    plan = draft_of(job)
    identity = Keeper(job, plan, None).identity()
    check_same(
        saved, {name: identity[name] for name in ("techniques", "dtype", "weights")}
    )  # its tensors would not fit, be cast, or stand beside a base that they were not trained on
    return load(plan, resume=saved.tensors)


def _warn(text: str) -> None:
    import logging

    logging.getLogger("treering").warning(text)
