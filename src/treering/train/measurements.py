"""Statistics of a run: those it begins with, and the measurement (`Ring`) added at its end, for the next task."""

import logging
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from treering.core.collectives import from_first, is_first
from treering.core.errors import CheckpointError
from treering.curvature import Ring, Statistics, measure
from treering.curvature import open as open_statistics
from treering.plan import Run
from treering.plan.open_model import locate
from treering.plan.prepared import Prepared
from treering.technique import Stage
from treering.train import calibration
from treering.train.checkpoints import files as checkpoint
from treering.train.checkpoints import manifest
from treering.train.config import Job
from treering.train.training import Training

FOLDER = "statistics"


def find(job: Job) -> Statistics | None:
    """Return the statistics that the job names, else those inside the model's folder, else None."""
    if job.statistics.path is not None:
        return open_statistics(Path(job.statistics.path).expanduser())
    if job.model.initialise:
        return None  # those in the folder are of other weights
    folder = locate(job.model.path) / FOLDER
    return open_statistics(folder) if folder.is_dir() else None


def refuse_missing(job: Job) -> None:
    """Raise CheckpointError if the run has a checkpoint that was trained with statistics, and they are missing.

    Without them a resumed run could not compute missing prepared results again, nor add its own measurement at its end.
    """
    try:
        if job.train.checkpoint.force or find(job) is not None:
            return
        problem = f"{job.model.path} has no folder {FOLDER}, and statistics.path names none"
    except CheckpointError as error:
        problem = str(error)
    root = Path(job.output) / "checkpoints"
    saved = next((one for step in reversed(checkpoint.steps(root)) if (one := _manifest(root, step))), None)
    identity = {} if saved is None else saved.facts.get("identity", {})
    if saved is None or identity.get("statistics") is None:
        return
    prepared = Path(job.output) / "prepared"
    results = Prepared(prepared) if prepared.is_dir() else None
    absent = sum(results is None or results.find(digest) is None for digest in saved.prepared.values())
    also = f"; {absent} of its {len(saved.prepared)} prepared results are missing from {prepared} too"
    raise CheckpointError(
        f"{root}/step-{saved.step} was trained with statistics (digest {identity['statistics']}), which are missing: "
        f"{problem}{also if absent else ''}. Put back a copy of that folder, or name it as statistics.path; text that "
        "is measured again gives other statistics"
    )


def _manifest(root: Path, step: int) -> manifest.Manifest | None:
    with suppress(CheckpointError):
        return manifest.load(root / f"step-{step}")
    return None


def grow(training: Training) -> None:
    """Measure the trained model on its training data; write the run's statistics with this ring to the output."""
    job, run, data, watchdog = training.job, training.run, training.data, training.watchdog
    base, step = training.checkpoints.statistics, training.reporter.at
    if base is None or not job.statistics.tokens:
        return
    folder = Path(job.output) / FOLDER
    documents = calibration.sample(data.examples, job.statistics.tokens, job.seed)
    digest = calibration.digest(documents)
    if from_first(str(is_first() and _done(folder, step, digest, base))) == "True":
        return

    def stop_if_asked(done: int, of: int) -> None:
        if watchdog.stop_asked():
            raise watchdog.signals.ended(
                f"step {step} is saved, and its training data is not measured yet; the same command does that"
            )

    _restore_forwards(run)
    batches = calibration.batches(documents, run.plan, job.data.max_length, data.packing)
    date = from_first(datetime.now(UTC).strftime("%Y-%m-%d"))
    ring = Ring(name=f"{_named(step)}{folder.absolute().parent.name}", tokens=0, data=digest, date=date)
    watchdog.phase.name = "measuring"
    with watchdog.usual_timeouts():
        statistics = measure(run, batches, ring=ring, onto=[base], to=folder, progress=stop_if_asked)
    tokens, number = statistics.rings[-1].tokens, len(statistics.rings)
    training.reporter.note(f"measured {tokens:,} tokens of the training data: {number} rings in {folder}")


def _restore_forwards(run: Run) -> None:
    """Undo tiles and recomputes, which change forwards for the sake of a backward: training is over, and inputs that
    come tile by tile cannot be counted by token. Ranks that share rows still do."""
    for technique, applied in zip(run.plan.techniques, run.plan.applied):
        early = technique.stage in (Stage.FORWARD, Stage.RECOMPUTE)
        if early and applied.undo is not None and applied.tokens is None:
            applied.undo()


def carried(job: Job, step: int) -> Path | None:
    """Return the statistics that go with an export of `step`: its own, or else those of the start."""
    grown, base = Path(job.output) / FOLDER, find(job)
    if base is None:
        return None
    with suppress(CheckpointError):
        if open_statistics(grown).rings[-1].name.startswith(_named(step)):
            return grown
    if job.statistics.tokens:
        logging.getLogger("treering").warning(
            f"{grown} is not of step {step}: the export carries the statistics that the run began with, and the next "
            "task cannot protect what this one trained; let the run end, or measure the export: treering measure"
        )
    return Path(base.where)


def _named(step: int) -> str:
    return f"step {step} of "


def _done(folder: Path, step: int, digest: str, base: Statistics) -> bool:
    with suppress(CheckpointError):  # missing or damaged: measured again
        rings = open_statistics(folder).rings
        return rings[:-1] == base.rings and rings[-1].name.startswith(_named(step)) and rings[-1].data == digest
    return False
