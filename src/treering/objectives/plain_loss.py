"""The sum of an objective over the trained positions of a micro-batch, of a model without a loss of a technique."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from treering.objectives.objective import INPUTS, Objective, objective_values, widened
from treering.objectives.trained import trained_positions


def plain_loss(model: nn.Module, batch: dict[str, Any], objective: Objective) -> Tensor:
    """Return the sum of `objective` over trained positions. The head is applied only at these positions.

    B rows of S positions, K positions that are trained in any row, N trained positions, V vocabulary.
    """
    trained = trained_positions(batch)
    keep_K = trained.columns_K
    nothing = trained.number == 0
    if nothing:  # the model still runs: other ranks wait for its gathers and reductions
        keep_K = torch.zeros(1, dtype=torch.long, device=keep_K.device)
    values = None if nothing else objective_values(objective, batch)
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BKV = model(**inputs, use_cache=False, logits_to_keep=keep_K).logits
    else:
        logits_BKV = model(**inputs, use_cache=False).logits[:, keep_K]
    if values is None:
        return widened(logits_BKV[:, :0]).sum()
    rows, logits_NV = values.select(lambda x: x[:, keep_K].flatten(0, 1)), logits_BKV.flatten(0, 1)
    index_N = trained.kept_N
    if index_N is not None:  # of several rows, one may train a position that another does not
        rows, logits_NV = rows.select(lambda x: x[index_N]), logits_NV[index_N]
    return rows.sum(widened(logits_NV))
