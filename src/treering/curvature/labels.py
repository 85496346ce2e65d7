"""Labels for gradients: those of the data, or drawn from the model's prediction, which gives the Fisher information.

A drawn label is a function of (seed, tokens of its document, position) and of the model's probabilities there, whatever
else is in the batch and wherever it is computed: u comes from a counter-based generator and the label is the first
token whose cumulative probability exceeds u. A generator with a state would give other labels in another batch, and
with them other statistics.

B rows, S positions, N trained positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F

from treering.core.philox import key, uniform
from treering.objectives import IGNORED

DRAWS = "label_draws"  # the batch's key: [B, S] float64 in [0, 1)


@dataclass(frozen=True, kw_only=True)
class SampledLabels:
    """Cross-entropy with labels drawn from the model's own probabilities, at the trained positions."""

    needs: ClassVar[tuple[str, ...]] = ("targets", DRAWS)
    copies: ClassVar[int] = 6  # the logits, in float32, their softmax, its sums in float64, the gradient

    def __call__(self, logits_NV: Tensor, rows: Any) -> Tensor:
        """Return the sum over rows. A row whose target is -100 adds 0 and has no gradient."""
        labels_N = drawn(logits_NV.detach(), rows[DRAWS]).masked_fill(rows["targets"] == IGNORED, IGNORED)
        return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


def drawn(logits_NV: Tensor, draws_N: Tensor) -> Tensor:
    """Return the first token of each row whose cumulative probability exceeds u ∈ [0, 1)."""
    sums = logits_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, draws_N[:, None] * sums[:, -1:], right=True)[:, 0].clamp_max(sums.shape[1] - 1)


def draws(batch: dict[str, Any], numbers_BS: Tensor, seed: int) -> Tensor:
    """Return u of every position of a complete batch, [B, S]; 0 where no document is."""
    ids, flat = batch["input_ids"].cpu().reshape(-1), numbers_BS.reshape(-1)
    result = torch.zeros(flat.shape, dtype=torch.float64)
    for number in flat.unique().tolist():
        if number < 0:
            continue
        places = (flat == number).nonzero().squeeze(1)
        digest = xxhash.xxh3_128_hexdigest(ids[places].numpy().astype("<i8").tobytes())
        result[places] = uniform(key(seed, "labels", digest), torch.arange(len(places)), 1)[:, 0]
    return result.view(numbers_BS.shape)


def with_targets(batch: dict[str, Any], numbers_BS: Tensor) -> dict[str, Any]:
    """Return a complete batch with `targets`: those of its labels or, where it has none, every next token of the same
    document."""
    if "targets" in batch:
        return batch
    device = batch["input_ids"].device
    labels = batch.get("labels", batch["input_ids"])
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    following = F.pad(numbers_BS[:, 1:], (0, 1), value=-1)
    inside = ((following == numbers_BS) & (numbers_BS >= 0)).to(device)
    return {**batch, "targets": targets.masked_fill(~inside, IGNORED)}


def with_gradient(numbers_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the documents of tokens, -1 for those after the last label of their document: no gradient reaches them."""
    trained = (targets_BS != IGNORED).cpu().reshape(-1)
    flat = numbers_BS.reshape(-1)
    places = torch.arange(len(flat))
    last = torch.full((int(flat.max()) + 2,), -1)
    last.scatter_reduce_(0, flat[trained] + 1, places[trained], "amax")
    return flat.masked_fill(places > last[flat + 1], -1).view(numbers_BS.shape)
