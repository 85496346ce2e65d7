"""Export a checkpoint of a run as a folder that transformers, or peft, loads."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from treering.core.errors import CheckpointError
from treering.plan import Plan, Run, load
from treering.plan.export import Experts
from treering.plan.export import export as write
from treering.plan.refill import completed
from treering.plan.values import saved_values
from treering.store.publish import on_first, refuse_taken
from treering.technique import LazyTensor, Stage, Technique
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints.identity import as_begun, changed_sources, check_same, identity_of
from treering.train.config import Job
from treering.train.measurements import carried, find


def export(
    job: Job,
    folder: Path,
    *,
    adapter: str | None = None,
    step: int | None = None,
    packed: bool = False,
    experts: Experts = "stacked",
) -> Path:
    """Write the newest checkpoint of `job`, or that of `step`, as a Hugging Face folder, or one `adapter` of it.

    With `packed`, quantized weights stay codes and scales, and `adapter` is written next to them; `experts` is that of
    `treering.plan.export.export`. Tensor by tensor: the model is never in memory. Returns the folder.
    """
    on_first(lambda: refuse_taken(folder), f"looking at {folder}")  # before gigabytes are verified
    plan, saved = reread(job, step=step)
    template = job.data.template  # the template of the training, not that of the base model
    files = {"chat_template.jinja": Path(template).expanduser()} if template is not None else {}
    statistics = carried(job, saved.step) if adapter is None and not packed else None
    values = saved_values(plan, _completed(job, plan, saved, exported_only=True))
    return write(
        plan, folder, adapter, packed=packed, experts=experts, values=values, files=files, statistics=statistics
    )


def reopen(job: Job, *, step: int | None = None, helping: Sequence[Technique] = ()) -> Run:
    """Return the run as it was at its newest checkpoint, or that of `step`, live in this process.

    Args:
        helping: techniques that train nothing and make a backward fit, or share it among ranks.
    """
    plan, saved = reread(job, step=step, helping=helping)
    run = load(plan, resume=_completed(job, plan, saved))
    run.number = saved.step
    return run


def _completed(
    job: Job, plan: Plan, saved: checkpoint.SavedCheckpoint, *, exported_only: bool = False
) -> Mapping[str, LazyTensor]:
    statistics = find(job)
    return completed(
        plan,
        saved.tensors,
        saved.prepared,
        Path(job.output) / "prepared",
        checkpoint=str(saved.folder),
        statistics=statistics,
        changed=changed_sources(saved, identity_of(job, plan, None, statistics)),
        exported_only=exported_only,
        note=logging.getLogger("treering").warning,
    )


def reread(
    job: Job, *, step: int | None = None, helping: Sequence[Technique] = ()
) -> tuple[Plan, checkpoint.SavedCheckpoint]:
    """Return the job's model composed again, without values, and the verified checkpoint that has them."""
    from treering.train.run import draft_of

    root = Path(job.output) / "checkpoints"
    if step is not None:
        if step not in (steps := checkpoint.steps(root)):
            raise CheckpointError(f"{root} has no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        saved: checkpoint.SavedCheckpoint | None = checkpoint.read(root / f"step-{step}")
    else:
        saved = checkpoint.newest(root, logging.getLogger("treering").warning)
    if saved is None:
        raise CheckpointError(
            f"{root} holds no complete checkpoint; train first: treering train {job.output}/config.yaml"
        )
    job, _ = as_begun(job)
    # Techniques that only make training faster or smaller do not change the weights, and may not run on this machine.
    lasting = tuple(t for t in job.techniques if t.stage in (Stage.QUANTIZE, Stage.ADAPT))
    # Nor is a teacher needed to read what was trained: its folder may be gone.
    job = replace(job, techniques=(*lasting, *helping), mesh={}, objective=None)
    plan = draft_of(job)
    identity = identity_of(job, plan, None, find(job))
    check_same(
        saved, {name: identity[name] for name in ("techniques", "dtype", "weights")}, plan.techniques
    )  # with others, its tensors would not fit, be cast, or be added to weights that they were not trained on
    return plan, saved
