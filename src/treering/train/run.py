"""Training, top to bottom: open, resume, step, evaluate, save, tell."""

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from treering.plan import Plan, draft
from treering.plan.opening import initialised, locate
from treering.seeds import derive
from treering.technique import Stage
from treering.topology import mesh
from treering.train import evaluate, fits, optimizers
from treering.train.callbacks import Callback
from treering.train.job import Job
from treering.train.keeper import Keeper
from treering.train.prepare import open_data, open_tokenizer, ranks_wait_for_first
from treering.train.schedule import rate
from treering.train.stopwatch import Stopwatch
from treering.train.tell import Teller


def train(job: Job, callbacks: Sequence[Callback] = (), *, profile: bool = False) -> dict[str, Any]:
    """Run `job` to its end, from its newest checkpoint if there is one. Returns the facts of the summary."""
    began = time.monotonic()
    settings = job.train
    tokenizer = open_tokenizer(job)
    plan = draft_of(job)
    tell = Teller(job, plan, callbacks)
    with ranks_wait_for_first():
        data = open_data(job, tokenizer, plan)
    for note in fits.check(job, plan, tokenizer, data):
        tell.note(note)
    keeper = Keeper(job, plan, data)
    run = keeper.load(tell.note)
    run.max_skips = settings.max_skips
    steppers = optimizers.build(run, settings.optimizer)
    start = keeper.restore(run, steppers)
    tell.started(run, data, start, time.monotonic() - began)
    watch = Stopwatch(profile, plan.device)
    batches = data.train.iter_from(start)
    steps = range(start, start if keeper.patience_is_over() else data.steps)
    if not steps:
        tell.note(f"nothing is left to do: step {start} of {data.steps} was the last")

    for step in steps:
        learning_rate = settings.optimizer.lr * rate(settings.schedule, step, data.steps)
        optimizers.set_rate(steppers, learning_rate)
        # Only a model that keeps its dropout draws from this; seeded by step, so that a resumed run draws the same.
        torch.manual_seed(derive(job.seed, "dropout", step, data.rank))
        with watch("data"):
            micro_batches = run.ready(next(batches))
        loss = torch.zeros((), dtype=torch.float64, device=plan.device)
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
        if data.eval is not None and judged:
            with watch("evaluation"):
                held_out = evaluate.held_out_loss(run, data.eval)
                keeper.judge(step + 1, held_out)
                tell.evaluated(step + 1, held_out)
        if settings.evaluate.prompts and judged:
            with watch("samples"):
                prompts, new_tokens = settings.evaluate.prompts, settings.evaluate.new_tokens
                tell.sampled(prompts, evaluate.samples(run, tokenizer, prompts, new_tokens, data.template))
        stop = keeper.patience_is_over()
        if last or stop or keeper.wants(step + 1) or due(step + 1, settings.checkpoint.every):
            with watch("checkpoint"):
                tell.saved(keeper.save(run, steppers, step + 1))
        if stop:
            tell.note(f"stopped early: no improvement in {settings.evaluate.patience} evaluations")
            break
    keeper.finish()
    return tell.finished(keeper, watch)


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
