"""Rotary embeddings whose frequencies depend on the largest position of a batch, where each rank has a part of it.

transformers takes the largest position that the module is given (rope types dynamic and longrope), so that each rank
would rotate by other frequencies. Here the module is given the largest position of the complete batch as one more
token, whose result is left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from treering.attention.hook import BATCH_DEPENDENT, ropes
from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward, install, undo_all


def depends_on_batch(config: Any) -> bool:
    """Return whether a model's frequencies depend on the largest position of a batch."""
    return any(rope.get("rope_type") in BATCH_DEPENDENT for rope in ropes(config.get_text_config()))


def install_rotary(model: nn.Module) -> Callable[[], None]:
    """Let the rotary embeddings of `model` see the largest position of the complete batch. Return undo."""
    undone = []
    for name, module in model.named_modules():
        if not any(key.endswith("inv_freq") for key in module._buffers):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        rotary = LastPositionRotary(module)
        undone.append(install(rotary))
        undone.append(install(LastPositionGiver(parent, rotary)))
    if not undone:
        raise PlanError(
            f"ulysses: the rotary embedding of {type(model).__name__} depends on the largest position of a batch, and "
            "no module with its frequencies was found; leave ulysses out, or train without a mesh axis `sequence`",
            settings=("ulysses",),
        )
    return undo_all(undone)


class LastPositionRotary(ModuleForward):
    """Cosine and sine of positions, with frequencies of `last`, the largest position of the batch, if it is set."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.last: int | None = None

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.last is None:
            return self.call_former(x, position_ids, *args, **kwargs)
        one_more = position_ids.new_full((*position_ids.shape[:-1], 1), self.last)
        cos, sin = self.call_former(x, torch.cat([position_ids, one_more], dim=-1), *args, **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]


class LastPositionGiver(ModuleForward):
    """The module that calls the rotary embedding: it knows the documents, and so the exchange of the batch."""

    def __init__(self, module: nn.Module, rotary: LastPositionRotary):
        super().__init__(module)
        self.rotary = rotary

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        exchange = getattr(kwargs.get("documents"), "exchange", None)
        self.rotary.last = getattr(exchange, "last_position", None)
        try:
            return self.call_former(*args, **kwargs)
        finally:
            self.rotary.last = None
