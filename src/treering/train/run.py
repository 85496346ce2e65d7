"""Training, top to bottom: open, resume, step, evaluate, save, report."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from treering.core.seeds import derive
from treering.core.topology import mesh, sequence_place
from treering.plan import Plan, StepReport, draft
from treering.plan.open_model import initialised, locate
from treering.plan.rehearse import rehearse
from treering.technique import Stage
from treering.train import measurements, optimizers
from treering.train.callbacks import Callback
from treering.train.checkpoints.identity import as_begun
from treering.train.checkpoints.manager import CheckpointManager
from treering.train.config import Job
from treering.train.evaluate import evaluate, evaluate_if_due
from treering.train.prepare import check_fit, open_data, open_tokenizer
from treering.train.ranks import lock
from treering.train.ranks.signals import Signals
from treering.train.ranks.watchdog import Watchdog
from treering.train.reporter import Reporter
from treering.train.training import Stopwatch, Training


def train(
    job: Job, callbacks: Sequence[Callback] = (), *, profile: bool = False, kept: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Train `job` to its end, from its newest checkpoint if there is one.

    A signal ends it with `Interrupted` and a checkpoint, a rank that is gone ends the others with `RankLost`.

    Args:
        job: the settings; treering.cli.train.job_of makes one from a file.
        callbacks: are given numbers on rank 0.
        profile: time each phase of a step, and give the callbacks a table.
        kept: which of the training documents train, in the order of `data.examples`; the others stay in their batches
            without a loss. None: all.

    Returns:
        The facts of the summary: steps, loss, best held-out loss, skipped, seconds.

    Example:
        train(Job(model=Model(path="MODEL"), data=Data(train="chat.jsonl"), techniques=(tr.Full(),), output="out"))
    """
    began = time.monotonic()
    with Signals() as signals:
        tokenizer = open_tokenizer(job)
        measurements.refuse_missing(job)
        job, begun = as_begun(job)
        plan = draft_of(job)
        reporter = Reporter(job, plan, callbacks)
        with Watchdog(job.train.timeout, signals) as watchdog, lock.locked(reporter.folder):
            with watchdog.first_rank_first():
                data = open_data(job, tokenizer, plan, kept)
            for text in (*begun, *check_fit(job, plan, tokenizer, data)):
                reporter.note(text)
            checkpoints = CheckpointManager(job, plan, data, measurements.find(job))
            run = checkpoints.load(reporter.note)
            rehearse(plan, reporter.folder)
            run.max_skips = job.train.max_skips
            steppers = optimizers.build(run, job.train.optimizer)
            start = checkpoints.restore(run, steppers)
            reporter.started(run, data, start, time.monotonic() - began)
            training = Training(
                job=job,
                run=run,
                data=data,
                tokenizer=tokenizer,
                optimizers=steppers,
                checkpoints=checkpoints,
                reporter=reporter,
                stopwatch=Stopwatch(profile, plan.device, watchdog.phase),
                watchdog=watchdog,
            )
            watchdog.exempt = checkpoints.saver.group
            signals.at_once = False
            _take_steps(training, start)
            run.finish()
            measurements.grow(training)
            phases = training.stopwatch.rows(reporter.steps) if profile else None
            return reporter.finished(checkpoints.progress, phases)


def _take_steps(training: Training, start: int) -> None:
    """Take the steps after `start`, to the last one or to where the run is asked to stop."""
    job, run, data = training.job, training.run, training.data
    checkpoints, reporter, watchdog = training.checkpoints, training.reporter, training.watchdog
    settings = job.train
    batches = data.train.iter_from(start)
    evaluate_if_due(training, start)
    reporter.resume_clock()
    steps = range(start, start if checkpoints.patience_is_over() else data.steps)
    if not steps:
        reporter.note(f"nothing is left to do: step {start} of {data.steps} was the last")

    for step in steps:
        watchdog.phase.begin(step + 1)
        learning_rate = settings.optimizer.lr * optimizers.rate(settings.schedule, step, data.steps)
        loss, report = _take_step(training, step, batches, learning_rate)
        last = step + 1 == data.steps
        evaluated = last or due(step + 1, settings.evaluate.every)
        with training.stopwatch("reporting"):
            log = evaluated or due(step + 1, settings.log_every)
            reporter.stepped(step + 1, loss, learning_rate, report, log=log)
        checkpoints.progress.record_step(report)
        with watchdog.usual_timeouts():
            if evaluated:
                evaluate(training, step + 1)
            early, asked = checkpoints.patience_is_over(), watchdog.stop_asked()
            final = last or early or asked
            if final or checkpoints.wants(step + 1) or due(step + 1, settings.checkpoint.every):
                with training.stopwatch("checkpoint"):
                    checkpoints.save(run, training.optimizers, step + 1, final=final, note=reporter.note)
        if asked and not (last and checkpoints.progress.owed is None):
            raise watchdog.signals.ended(f"saved step {step + 1}, and the same command resumes from there")
        if early:
            reporter.note(f"stopped early: no improvement in {settings.evaluate.patience} evaluations")
            break
        reporter.resume_clock()
        watchdog.lower_timeouts()  # the first step has compiled and loaded what there was


def _take_step(
    training: Training, step: int, batches: Iterator[list[dict[str, Any]]], learning_rate: float
) -> tuple[torch.Tensor, StepReport]:
    """Take one step. Returns this rank's share of its loss, and the report."""
    run, stopwatch = training.run, training.stopwatch
    optimizers.set_rate(training.optimizers, learning_rate)
    # Only a model that keeps its dropout draws from this; seeded by step, so that a resumed run draws the same. Ranks
    # that share a row have other tokens of it.
    places = (training.data.rank, *sequence_place(run.plan.mesh))
    torch.manual_seed(derive(training.job.seed, "dropout", step, *places))
    with stopwatch("data"):
        micro_batches = run.ready(next(batches))
    loss = torch.zeros((), dtype=torch.float64, device=run.plan.device)
    for batch in micro_batches:
        with stopwatch("forward"):
            share = run.loss(batch)
        with stopwatch("backward"):
            share.backward()
        loss += share.detach()
    with stopwatch("step"):
        return loss, run.step(training.optimizers, clip=training.job.train.clip)


def draft_of(job: Job) -> Plan:
    """Return the job's model with its techniques in place, before any weight is read."""
    folder = locate(job.model.path)
    model = initialised(folder, job.model.dtype, job.seed) if job.model.initialise else folder
    return draft(
        model,
        job.techniques,
        mesh=mesh(**dict(job.mesh)) if _needs_mesh(job) else None,  # type: ignore[arg-type]
        dtype=job.model.dtype,
        seed=job.seed,
        dropout=job.model.dropout,
        statistics=measurements.find(job),
        roles=job.model.roles,
        objective=job.objective,
        dequantize=job.model.dequantize,
        name=job.model.path,
        folder=folder,
    )


def _needs_mesh(job: Job) -> bool:
    """Return whether a process group is needed: one process that shards nothing needs none."""
    several = dist.get_world_size() > 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several or any(t.stage == Stage.SHARD for t in job.techniques)


def due(step: int, every: int | None) -> bool:
    """Return whether something that is done every so many steps, or never, is done at `step`."""
    return every is not None and step % every == 0
