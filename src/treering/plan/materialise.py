"""From the meta device to memory: empty parameters, tied ones staying one, and buffers with their true values."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_meta(model: nn.Module) -> None:
    """Give every parameter's memory back; buffers stay. Whoever wants the values has made a Source before."""
    _replace(model, lambda p: torch.empty_like(p, device="meta"))


def remember(model: nn.Module) -> Callable[[], None]:
    """Returns what puts the parameters of now back in their places."""
    places = [
        (module, name, parameter, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]

    def give_back() -> None:
        for module, name, parameter, learns in places:
            parameter.requires_grad_(learns)
            module._parameters[name] = parameter

    return give_back


def materialise(model: "PreTrainedModel", device: torch.device, resting: torch.device) -> None:
    """Memory for what is on meta: parameters on `resting`, still without values; buffers on `device`, with values."""
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
    """Non-persistent buffers (rotary frequencies) are in no file: the model's own initialisation computes them."""
    for module in model.modules():
        waiting: list[str] = []
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
                continue
            module._buffers[name] = torch.empty_like(buffer, device=device)
            if name in module._non_persistent_buffers_set:
                waiting.append(name)
        if waiting:
            _compute(model, module, waiting)


def _compute(model: "PreTrainedModel", module: nn.Module, waiting: list[str]) -> None:
    """Computed from two different beginnings: what keeps a trace of either is noise that would show up later."""
    for parameter in module.parameters(recurse=False):
        # fill() gives the values: nothing is to be drawn for them here
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    found: list[dict[str, Tensor]] = []
    for beginning in (0, 1):
        for name in waiting:
            _held(module, name).fill_(beginning)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model._init_weights(module)
        found.append({name: _held(module, name).clone() for name in waiting})
    for name in waiting:
        if not torch.equal(found[0][name], found[1][name]):
            raise PlanError(
                f"{type(model).__name__}: the buffer {name!r} of {type(module).__name__} is in no checkpoint and the "
                "model's initialisation does not compute it; load the model yourself and give compose() the live model"
            )


def _held(module: nn.Module, name: str) -> Tensor:
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer
