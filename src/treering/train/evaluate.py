"""Evaluation between two steps: the loss on held-out documents, and generated samples to read."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from treering.data.loader import Loader
from treering.plan import Run
from treering.train.prepare import encode
from treering.train.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(training: Training, step: int) -> None:
    """Evaluate the model as it is after `step`.

    An evaluation that a signal interrupts is recorded as due, and happens when the run is resumed, see
    `evaluate_if_due`.
    """
    asked, settings = training.watchdog.stop_asked, training.job.train.evaluate
    if training.data.eval is not None:
        with training.stopwatch("evaluation"):
            held_out = held_out_loss(training.run, training.data.eval, asked)
            training.checkpoints.progress.owed = step if held_out is None else None
            if held_out is None:
                return
            training.checkpoints.progress.record_loss(step, held_out)
            training.reporter.evaluated(step, held_out)
    if settings.prompts:
        with training.stopwatch("samples"):
            texts = samples(
                training.run,
                training.tokenizer,
                settings.prompts,
                settings.new_tokens,
                training.data.template,
                asked,
            )
            training.reporter.sampled(settings.prompts, texts)


def evaluate_if_due(training: Training, start: int) -> None:
    """Do the evaluation that was interrupted before step `start` was saved."""
    if start and training.checkpoints.progress.owed == start:
        evaluate(training, start)


@torch.no_grad()
def held_out_loss(run: Run, loader: Loader, stop_asked: Callable[[], bool] = lambda: False) -> float | None:
    """Return the mean loss over all trained tokens of the evaluation data, on every mesh and for every size of step.

    Returns None if the run was asked to stop before the end.
    """
    run.model.eval()
    summed, tokens = torch.zeros((), dtype=torch.float64, device=run.plan.device), 0
    try:
        for batches in loader.once():
            if stop_asked():
                return None
            count = batches[0]["count"]
            for batch in run.ready(batches):
                summed += run.loss(batch).double() * count
            tokens += count
    finally:
        run.model.train()
    return float(run.total(summed)) / tokens


@torch.no_grad()
def samples(
    run: Run,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    new_tokens: int,
    template: str | None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Return greedy continuations. Every rank generates the same ones: a sharded model needs all ranks in a forward."""
    run.model.eval()
    texts: list[str] = []
    try:
        for prompt in prompts:
            if stop_asked():
                break
            ids = encode(tokenizer, prompt, template).to(run.plan.device)
            generated = run.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
            )
            texts.append(str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)))
    finally:
        run.model.train()
    return texts
