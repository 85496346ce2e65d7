"""Statistics of a run: those it begins with, and the ring that it adds at its end, for the task after it."""

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from treering.core.collectives import from_first, is_first
from treering.core.errors import CheckpointError
from treering.curvature import Ring, Statistics, measure
from treering.curvature import open as open_statistics
from treering.plan import Run
from treering.plan.open_model import locate
from treering.technique import Stage
from treering.train import calibration
from treering.train.job import Job
from treering.train.prepare import RunData
from treering.train.ranks.watchdog import Watchdog
from treering.train.stopwatch import Stopwatch

FOLDER = "statistics"


def find(job: Job) -> Statistics | None:
    """Return the statistics to protect: of the folder that the job names, else of the model's own, else None."""
    if job.statistics.path is not None:
        return open_statistics(Path(job.statistics.path).expanduser())
    if job.model.initialise:
        return None  # statistics in the folder are of other weights
    folder = locate(job.model.path) / FOLDER
    return open_statistics(folder) if folder.is_dir() else None


def grow(
    run: Run,
    job: Job,
    data: RunData,
    base: Statistics | None,
    step: int,
    note: Callable[[str], None],
    watchdog: Watchdog,
) -> None:
    """Measure the trained model on its training data, and write what it began with and this ring to the output."""
    if base is None or not job.statistics.tokens:
        return
    folder = Path(job.output) / FOLDER
    documents = calibration.sample(data.examples, job.statistics.tokens, job.seed)
    digest = calibration.digest(documents)
    if from_first(str(is_first() and _done(folder, step, digest, base))) == "True":
        return

    def look(done: int, of: int) -> None:
        if watchdog.stop_asked():
            raise watchdog.signals.ended(
                f"step {step} is saved, and what it taught is not measured yet; the same command does that"
            )

    _whole_forwards(run)
    batches = calibration.batches(documents, run.plan, job.data.max_length, data.packing)
    date = from_first(datetime.now(UTC).strftime("%Y-%m-%d"))
    ring = Ring(name=f"{_named(step)}{folder.absolute().parent.name}", tokens=0, data=digest, date=date)
    with watchdog.patience(), Stopwatch(False, run.plan.device, watchdog.phase)("measuring"):
        grown = measure(run, batches, ring=ring, onto=[base], to=folder, progress=look)
    note(f"measured {grown.rings[-1].tokens:,} tokens of the training data: {len(grown.rings)} rings in {folder}")


def _whole_forwards(run: Run) -> None:
    """Undo forwards that compute in another way for a backward: inputs in tiles cannot be counted by token."""
    for technique, applied in zip(run.plan.techniques, run.plan.applied):
        if technique.stage in (Stage.FORWARD, Stage.RECOMPUTE) and applied.undo is not None:
            applied.undo()


def carried(job: Job, step: int) -> Path | None:
    """Return the statistics to export with `step`: with its own ring, or those that the run began with."""
    grown, base = Path(job.output) / FOLDER, find(job)
    if base is None:
        return None
    with suppress(CheckpointError):
        if open_statistics(grown).rings[-1].name.startswith(_named(step)):
            return grown
    if job.statistics.tokens:
        logging.getLogger("treering").warning(
            f"{grown} is not of step {step}: the export carries the statistics that the run began with, and the next "
            "task will not know what this one taught; let the run end, or measure the export: treering measure"
        )
    return Path(base.where)


def _named(step: int) -> str:
    return f"step {step} of "


def _done(folder: Path, step: int, digest: str, base: Statistics) -> bool:
    with suppress(CheckpointError):  # none there, or one that is damaged: made again
        rings = open_statistics(folder).rings
        return rings[:-1] == base.rings and rings[-1].name.startswith(_named(step)) and rings[-1].data == digest
    return False
