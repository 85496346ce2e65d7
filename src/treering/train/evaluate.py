"""Evaluation between two steps: the loss on held-out documents, and generated samples to read."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from treering.data.loader import Loader
from treering.objectives import score_names
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
            scores = held_out_scores(training.run, training.data.eval, asked)
            training.checkpoints.progress.owed = step if scores is None else None
            if scores is None:
                return
            training.checkpoints.progress.record_loss(step, scores["loss"])
            training.reporter.evaluated(step, scores)
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


def held_out_loss(run: Run, loader: Loader, stop_asked: Callable[[], bool] = lambda: False) -> float | None:
    """Return the loss among `held_out_scores`."""
    scores = held_out_scores(run, loader, stop_asked)
    return None if scores is None else scores["loss"]


@torch.no_grad()
def held_out_scores(
    run: Run, loader: Loader, stop_asked: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Return means over all trained tokens of the evaluation data, on every mesh and for every size of step.

    They are `loss` and what the objective reports besides (`Run.scores`), with a perplexity if that has cross-entropy.
    Where the objective has a score for this (`held_out`), this is `loss`, and its own value is `objective`.
    Returns None if the run was asked to stop before the end.
    """
    run.model.eval()
    names = ("loss", *score_names(run.plan.objective))
    summed, tokens = torch.zeros(len(names), dtype=torch.float64, device=run.plan.device), 0
    try:
        for batches in loader.once():
            if stop_asked():
                return None
            count = batches[0]["count"]
            for batch in run.ready(batches):
                scores = run.scores(batch)
                summed += torch.stack([scores[name].double() for name in names]) * count
            tokens += count
    finally:
        run.model.train()
    means = dict(zip(names, (run.total(summed) / tokens).tolist(), strict=True))
    if "cross_entropy" in means:
        means["perplexity"] = float(torch.tensor(means["cross_entropy"], dtype=torch.float64).exp())
    compared = getattr(run.plan.objective, "held_out", "loss")
    if compared != "loss":
        means = {"loss": means.pop(compared), "objective": means.pop("loss"), **means}
    return means


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
