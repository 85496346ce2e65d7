"""Training, top to bottom: open, resume, step, evaluate, save, tell."""

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from treering.core.seeds import derive
from treering.core.topology import mesh
from treering.plan import Plan, Run, draft
from treering.plan.open_model import initialised, locate
from treering.plan.rehearse import rehearse
from treering.technique import Stage
from treering.train import fits, optimizers
from treering.train import measurements as rings
from treering.train.callbacks import Callback
from treering.train.checkpoints.manager import Keeper
from treering.train.checkpoints.saving import save
from treering.train.evaluator import Judge
from treering.train.job import Job
from treering.train.prepare import open_data, open_tokenizer
from treering.train.ranks import lock
from treering.train.ranks.signals import Signals
from treering.train.ranks.watchdog import Watchdog
from treering.train.reporter import Teller
from treering.train.schedule import rate
from treering.train.stopwatch import Stopwatch


def train(job: Job, callbacks: Sequence[Callback] = (), *, profile: bool = False) -> dict[str, Any]:
    """Run `job` to its end, from its newest checkpoint if there is one. Returns the facts of the summary.

    A signal ends it with `Interrupted` and a checkpoint, a rank that is gone ends the others with `RankLost`.
    """
    began = time.monotonic()
    with Signals() as signals:
        tokenizer = open_tokenizer(job)
        plan = draft_of(job)
        tell = Teller(job, plan, callbacks)
        with Watchdog(job.train.timeout, signals) as watchdog, lock.held(tell.folder):
            with watchdog.first_goes_first():
                data = open_data(job, tokenizer, plan)
            for note in fits.check(job, plan, tokenizer, data):
                tell.note(note)
            keeper = Keeper(job, plan, data)
            run = keeper.load(tell.note)
            rehearse(plan, tell.folder)
            run.max_skips = job.train.max_skips
            steppers = optimizers.build(run, job.train.optimizer)
            start = keeper.restore(run, steppers)
            tell.started(run, data, start, time.monotonic() - began)
            watch = Stopwatch(profile, plan.device, watchdog.phase)
            judge = Judge(
                run=run, data=data, tokenizer=tokenizer, keeper=keeper, tell=tell, watch=watch, watchdog=watchdog
            )
            watchdog.spared = keeper.saver.group
            signals.at_once = False
            _steps(run, steppers, judge, start)
            rings.grow(run, job, data, keeper.statistics, tell.at, tell.note, watchdog)
            return tell.finished(keeper, watch)


def _steps(run: Run, steppers: Sequence[Optimizer], judge: Judge, start: int) -> None:
    """The loop: from step `start` to the last one, or to where it is asked to stop."""
    keeper, tell, data, watch, watchdog = judge.keeper, judge.tell, judge.data, judge.watch, judge.watchdog
    job, settings = keeper.job, keeper.job.train
    batches = data.train.iter_from(start)
    judge.pay(start)
    steps = range(start, start if keeper.patience_is_over() else data.steps)
    if not steps:
        tell.note(f"nothing is left to do: step {start} of {data.steps} was the last")

    for step in steps:
        watchdog.phase.begin(step + 1)
        learning_rate = settings.optimizer.lr * rate(settings.schedule, step, data.steps)
        optimizers.set_rate(steppers, learning_rate)
        # Only a model that keeps its dropout draws from this; seeded by step, so that a resumed run draws the same.
        torch.manual_seed(derive(job.seed, "dropout", step, data.rank))
        with watch("data"):
            micro_batches = run.ready(next(batches))
        loss = torch.zeros((), dtype=torch.float64, device=run.plan.device)
        for batch in micro_batches:
            with watch("forward"):
                share = run.loss(batch)
            with watch("backward"):
                share.backward()
            loss += share.detach()
        with watch("step"):
            report = run.step(steppers, clip=settings.clip)
        last = step + 1 == data.steps
        judged = last or due(step + 1, settings.evaluate.every)
        with watch("telling"):
            tell.stepped(step + 1, loss, learning_rate, report, log=judged or due(step + 1, settings.log_every))
        keeper.took(report)
        with watchdog.patience():
            if judged:
                judge.after(step + 1)
            early, asked = keeper.patience_is_over(), watchdog.stop_asked()
            final = last or early or asked
            if final or keeper.wants(step + 1) or due(step + 1, settings.checkpoint.every):
                with watch("checkpoint"):
                    save(keeper, run, steppers, step + 1, tell, final)
        if asked and not (last and keeper.counts.get("owed") is None):
            raise watchdog.signals.ended(f"saved step {step + 1}, and the same command goes on from there")
        if early:
            tell.note(f"stopped early: no improvement in {settings.evaluate.patience} evaluations")
            break
        watchdog.hurry()  # the first step has compiled and loaded what there was


def draft_of(job: Job) -> Plan:
    """The job's model with its techniques in place, before any weight is read."""
    folder = locate(job.model.path)
    model = initialised(folder, job.model.dtype, job.seed) if job.model.initialise else folder
    return draft(
        model,
        job.techniques,
        mesh=mesh(**dict(job.mesh)) if _needs_mesh(job) else None,  # type: ignore[arg-type]
        dtype=job.model.dtype,
        seed=job.seed,
        dropout=job.model.dropout,
        statistics=rings.find(job),
        roles=job.model.roles,
        name=job.model.path,
        folder=folder,
    )


def _needs_mesh(job: Job) -> bool:
    """One process that shards nothing needs no process group."""
    several = dist.get_world_size() > 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several or any(t.stage == Stage.SHARD for t in job.techniques)


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
