"""The run's loss with the head in tiles.

The model's forward, asked for a loss, runs everything below the head, picks the trained tokens and hands these and
their targets to the head; the head's forward, given targets, computes the loss in tiles. Both are called as modules,
so whatever gathers their weights does so exactly as it does for logits.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering import forwards
from treering.technique import Applied, Site
from treering.tiling.lengths import tile_length
from treering.tiling.losses import IGNORED, Head, Tiled
from treering.tiling.mlp import sums_wide

if TYPE_CHECKING:
    from treering.technique import Batch
    from treering.tiling.config import TiledLoss

INPUTS = ("input_ids", "position_ids", "attention_mask", "documents")
BYTES = 16  # of one logit at the peak: itself, in float32, its softmax, its gradient twice


def attach(model: nn.Module, config: "TiledLoss", site: Site) -> Applied:
    found = site.anatomy.head
    assert found is not None, "claims refuse a model without a head"
    head: Any = model.get_submodule(found.fqn)
    body: Any = model.base_model  # type: ignore[union-attr]
    plain, plain_head = model.forward, head.forward
    tiled = Tiled(Head(module=head, scale=found.scale, softcap=found.softcap, forward=plain_head), name=found.fqn)
    vocabulary = model.get_parameter(found.weight).shape[0]

    def of_head(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return plain_head(hidden)
        wide = sums_wide(tiled.region, config.accumulate, config.budget)
        return tiled.cross_entropy(
            hidden,
            targets,
            size=tile_length(config.tile, config.budget, BYTES * vocabulary, hidden.shape[-1]),
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            wide=wide,
        )

    @functools.wraps(plain)
    def of_model(*args: Any, treering_labels: Tensor | None = None, **kwargs: Any) -> Any:
        if treering_labels is None:
            return plain(*args, **kwargs)
        hidden = body(*args, **kwargs, use_cache=False).last_hidden_state
        return head(*trained(hidden, treering_labels))

    undone = [forwards.replace(head, of_head), forwards.replace(model, of_model)]
    long = f"{config.budget:g} GiB of logits" if config.tile == "budget" else f"{config.tile} tokens"
    return Applied(loss=loss, undo=forwards.undo_all(undone), notes=(f"head and cross-entropy on {long} at a time",))


def loss(model: nn.Module, batch: "Batch") -> Tensor:
    """Σ over trained tokens of −log p(token | before)."""
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    return model(**inputs, treering_labels=batch["labels"])


def trained(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states of the tokens that predict a trained one, these), N × H and N. Never empty: ranks go together."""
    following = labels[:, 1:].reshape(-1)
    keep = (following != IGNORED).nonzero().squeeze(1)
    if keep.numel() == 0:
        return hidden[:1, 0], torch.full((1,), IGNORED, device=labels.device)
    if keep.numel() == following.numel():
        return hidden[:, :-1].reshape(-1, hidden.shape[-1]), following
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    return rows[keep], following[keep]
