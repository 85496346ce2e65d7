"""From the meta device to memory: empty parameters, tied ones staying one, and buffers with their true values."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_meta(model: nn.Module) -> None:
    """Give every parameter's memory back; buffers stay. Whoever wants the values has made a Source before."""
    _replace(model, lambda p: torch.empty_like(p, device="meta"))


def materialise(model: "PreTrainedModel", device: torch.device, resting: torch.device) -> None:
    """Memory for everything on meta: parameters on `resting`, still without values; buffers on `device`, with values."""
    _replace(model, lambda p: torch.empty_like(p, device=resting) if p.is_meta else p.to(resting))
    _buffers(model, device)


def _replace(model: nn.Module, make) -> None:
    """Exchange parameters owner by owner. `Module.to_empty` would make two parameters of a tied one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if old not in made:
                made[old] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
            module._parameters[name] = made[old]


def _buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Non-persistent buffers (rotary frequencies) are in no file: the model's own initialisation computes them.

    They are filled with a sentinel first, so that one which nobody computes is an error here and not noise later.
    """
    for module in model.modules():
        waiting: list[tuple[str, Tensor]] = []
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
                continue
            empty = torch.empty_like(buffer, device=device)
            if name in module._non_persistent_buffers_set:
                empty.fill_(_sentinel(empty.dtype))
                waiting.append((name, empty))
            module._buffers[name] = empty
        if waiting:
            _compute(model, module, waiting)


def _compute(model: "PreTrainedModel", module: nn.Module, waiting: list[tuple[str, Tensor]]) -> None:
    # `_init_weights` also draws parameters that the module holds itself: values that fill() overwrites. Its random
    # numbers must not advance the user's generator.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model._init_weights(module)
    for name, _ in waiting:
        value = module._buffers[name]
        assert value is not None
        if value.numel() and bool((value == _sentinel(value.dtype)).all() if value.dtype.is_floating_point else False):
            raise PlanError(
                f"{type(model).__name__}: the buffer {name!r} of {type(module).__name__} is in no checkpoint and the "
                "model's initialisation does not compute it; load the model yourself and give compose() the live model"
            )


def _sentinel(dtype: torch.dtype) -> float:
    return -7.0e33 if dtype in (torch.float32, torch.float64, torch.bfloat16) else 0
