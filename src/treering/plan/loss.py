"""Next-token cross-entropy, summed over trained tokens. Who divides by their global number is `Run.loss`."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
INPUTS = ("input_ids", "position_ids", "attention_mask", "documents")


def trained_tokens(labels: Tensor) -> int:
    """labels[:, 0] is never predicted: there is nothing before it."""
    return int((labels[:, 1:] != IGNORED).sum())


def cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Σ −log p(token | before). The head is applied only where a trained token is predicted.

    B rows, K positions that predict a trained token in any row, V vocabulary.
    """
    labels = batch["labels"]
    following = labels[:, 1:]
    keep = (following != IGNORED).any(0).nonzero().squeeze(1)
    if keep.numel() == 0:  # an empty micro-batch still runs: other ranks wait for its gathers and reductions
        keep = torch.zeros(1, dtype=torch.long, device=labels.device)
        targets_BK = torch.full((labels.shape[0], 1), IGNORED, device=labels.device)
    else:
        targets_BK = following[:, keep]
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BKV = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    else:
        logits_BKV = model(**inputs, use_cache=False).logits[:, keep]
    wide = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="sum")
