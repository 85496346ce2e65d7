"""Install packed attention on one model, and undo it."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from treering.attention.packable import packable
from treering.core.errors import PlanError

if TYPE_CHECKING:
    from treering.anatomy import Anatomy

NAME = "treering"
REGISTERED = "_treering_attention"


def install(model: nn.Module, anatomy: "Anatomy | None" = None) -> Callable[[], None]:
    """Let `model(input_ids, documents=...)` keep documents apart; without `documents` nothing changes. Returns undo.

    A configuration object may belong to several models, so this model's modules get a copy of theirs; undo gives them
    back the very objects they had.
    """
    from transformers import PretrainedConfig

    reason = packable(model, anatomy)
    if reason:
        raise PlanError(f"packing was asked for, but {reason}; switch packing off (data: packing: off)")
    configurations = [
        (module, attribute, value)
        for module in model.modules()
        for attribute, value in vars(module).items()
        if isinstance(value, PretrainedConfig)
    ]
    registered = vars(model)[REGISTERED] = Registered()
    seen: dict[int, object] = {}  # one memo for all: configurations inside configurations stay the same object
    for module, attribute, value in configurations:
        copied = copy.deepcopy(value, seen)
        copied._attn_implementation = NAME
        setattr(module, attribute, copied)

    def undo() -> None:
        for module, attribute, value in configurations:
            setattr(module, attribute, value)
        if vars(model).get(REGISTERED) is registered:
            del vars(model)[REGISTERED]

    return undo


class Registered:
    """Registers the attention with transformers under its name. It is an attribute of the model, so that reading a
    pickle of the model, perhaps in another process, registers it too."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        from treering.attention.hook import attention, deferred_mask

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, deferred_mask)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Registered, ()
