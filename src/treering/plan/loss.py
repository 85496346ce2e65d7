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


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `targets`: what each position predicts, the label of the next one; nothing at the end of a row.

    Labels are shifted here and nowhere else, once a micro-batch, so that techniques may cut rows and lose no target.
    """
    if "targets" in batch or "labels" not in batch:  # what is only measured has no labels
        return batch
    return {**batch, "targets": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}


def cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Σ −log p(token | before). The head is applied only where a trained token is predicted.

    B rows of S tokens, K positions that predict a trained token in any row, V vocabulary.
    """
    targets_BS = batch["targets"]
    keep = (targets_BS != IGNORED).any(0).nonzero().squeeze(1)
    if keep.numel() == 0:  # an empty micro-batch still runs: other ranks wait for its gathers and reductions
        keep = torch.zeros(1, dtype=torch.long, device=targets_BS.device)
    targets_BK = targets_BS[:, keep]
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BKV = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    else:
        logits_BKV = model(**inputs, use_cache=False).logits[:, keep]
    wide = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="sum")
