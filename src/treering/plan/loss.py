"""The plain loss: the objective of a run on all trained positions at once. `Run.loss` divides it by their number."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core.errors import PlanError
from treering.objectives import IGNORED, INPUTS, CrossEntropy, Objective, objective_values, widened
from treering.technique import Applied


def trained_tokens(labels: Tensor) -> int:
    """Return how many labels are trained. The first of a row never is: nothing precedes it."""
    return int((labels[:, 1:] != IGNORED).sum())


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with `targets`: what each position predicts, the label of the next one; -100 at a row's end.

    Labels are shifted here and nowhere else, once a micro-batch, so that techniques may cut rows and lose no target.
    """
    if "targets" in batch or "labels" not in batch:  # what is only measured has no labels
        return batch
    return {**batch, "targets": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}


def choose_objective(given: Objective | None, applied: Sequence[Applied]) -> Objective:
    """Return the objective of a run: the one given, or the one that a technique's settings ask for, or cross-entropy.

    Args:
        given: The argument of `compose`.
        applied: What the run's techniques left behind.
    """
    asked = [one.objective for one in applied if one.objective is not None]
    if given is not None and asked:
        raise PlanError(
            f"the objective is {given!r}, and the settings of a technique ask for {asked[0]!r}; write label_smoothing "
            "and z_loss into the objective, and leave them out of tiledloss"
        )
    return given or (asked[0] if asked else CrossEntropy())


def plain_loss(model: nn.Module, batch: dict[str, Any], objective: Objective) -> Tensor:
    """Return the sum of `objective` over trained positions. The head is applied only at positions that are trained.

    B rows of S positions, K positions that are trained in any row, N trained positions, V vocabulary.
    """
    trained_BS = batch["targets"] != IGNORED
    keep_K = trained_BS.any(0).nonzero().squeeze(1)
    nothing = keep_K.numel() == 0
    if nothing:  # the model still runs: other ranks wait for its gathers and reductions
        keep_K = torch.zeros(1, dtype=torch.long, device=trained_BS.device)
    values = None if nothing else objective_values(objective, batch)
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BKV = model(**inputs, use_cache=False, logits_to_keep=keep_K).logits
    else:
        logits_BKV = model(**inputs, use_cache=False).logits[:, keep_K]
    if values is None:
        return widened(logits_BKV[:, :0]).sum()
    rows, logits_NV = values.select(lambda x: x[:, keep_K].flatten(0, 1)), logits_BKV.flatten(0, 1)
    if len(trained_BS) > 1:  # of several rows, one may train a position that another does not
        index_N = trained_BS[:, keep_K].flatten().nonzero().squeeze(1)
        rows, logits_NV = rows.select(lambda x: x[index_N]), logits_NV[index_N]
    return rows.sum(widened(logits_NV))


def cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return Σ −log p(token | those before it) over trained tokens."""
    return plain_loss(model, batch, CrossEntropy())
