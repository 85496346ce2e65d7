"""The run's loss with the head in tiles.

The model's forward, asked for a loss, runs everything below the head, picks the trained tokens and hands these and
their targets to the head; the head's forward, given targets, computes the loss in tiles. Both are called as modules,
so whatever gathers their weights does so exactly as it does for logits.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.core import module_forward as forwards
from treering.technique import Applied, Site
from treering.techniques.tiling.lengths import tile_length
from treering.techniques.tiling.losses import IGNORED, Head, Tiled
from treering.techniques.tiling.mlp import sums_wide

if TYPE_CHECKING:
    from treering.anatomy import Head as AnatomyHead
    from treering.technique import Batch
    from treering.techniques.tiling.settings import TiledLossSettings

INPUTS = ("input_ids", "position_ids", "attention_mask", "documents")
BYTES = 16  # of one logit at the peak: itself, in float32, its softmax, its gradient twice


def attach(model: nn.Module, config: "TiledLossSettings", site: Site) -> Applied:
    found = site.anatomy.head
    assert found is not None, "claims refuse a model without a head"
    head: Any = model.get_submodule(found.fqn)
    body: Any = model.base_model  # type: ignore[union-attr]
    vocabulary = model.get_parameter(found.weight).shape[0]
    of_head = _HeadForward(head, config, found, vocabulary)
    undone = [forwards.install(of_head), forwards.install(_ModelForward(model, body, head))]
    long = f"{config.budget:g} GiB of logits" if config.tile == "budget" else f"{config.tile} tokens"
    return Applied(loss=loss, undo=forwards.undo_all(undone), notes=(f"head and cross-entropy on {long} at a time",))


class _HeadForward(forwards.ModuleForward):
    """Logits; or, given targets, their loss in tiles."""

    def __init__(self, module: nn.Module, config: "TiledLossSettings", found: "AnatomyHead", vocabulary: int):
        super().__init__(module)
        self.config, self.vocabulary = config, vocabulary
        head = Head(module=module, scale=found.scale, softcap=found.softcap, forward=self.call_former)
        self.tiled = Tiled(head, name=found.fqn)

    def __call__(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self.call_former(hidden)
        config = self.config
        return self.tiled.cross_entropy(
            hidden,
            targets,
            size=tile_length(config.tile, config.budget, BYTES * self.vocabulary, hidden.shape[-1]),
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            wide=sums_wide(self.tiled.region, config.accumulate, config.budget),
        )


class _ModelForward(forwards.ModuleForward):
    """What the model gives; or, given targets, the loss that its head makes of them."""

    def __init__(self, module: nn.Module, body: nn.Module, head: nn.Module):
        super().__init__(module)
        self.body, self.head = body, head

    def __call__(self, *args: Any, treering_targets: Tensor | None = None, **kwargs: Any) -> Any:
        if treering_targets is None:
            return self.call_former(*args, **kwargs)
        hidden = self.body(*args, **kwargs, use_cache=False).last_hidden_state
        return self.head(*trained(hidden, treering_targets))


def loss(model: nn.Module, batch: "Batch") -> Tensor:
    """Σ over trained tokens of −log p(token | before)."""
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    return model(**inputs, treering_targets=batch["targets"])


def trained(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states of the tokens that predict a trained one, these), N × H and N. Never empty: ranks go together."""
    flat = targets.reshape(-1)
    keep = (flat != IGNORED).nonzero().squeeze(1)
    if keep.numel() == 0:
        return hidden[:1, 0], torch.full((1,), IGNORED, device=targets.device)
    before_last = targets[:, :-1].reshape(-1)
    if keep.numel() == before_last.numel() and bool(
        (before_last != IGNORED).all()
    ):  # all but the last: no copy by index
        return hidden[:, :-1].reshape(-1, hidden.shape[-1]), before_last
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows[keep], flat[keep]
