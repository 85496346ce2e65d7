"""From the meta device to memory: empty parameters, of which tied ones stay one, and buffers with their values."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_meta(model: nn.Module) -> None:
    """Free every parameter's memory; buffers stay. Who needs the values has made a Source before."""
    _replace(model, lambda p: torch.empty_like(p, device="meta"))


def remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts the present parameters back in their places."""
    places = [
        (module, name, parameter, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]

    def put_back() -> None:
        for module, name, parameter, learns in places:
            parameter.requires_grad_(learns)
            module._parameters[name] = parameter

    return put_back


def materialise(model: "PreTrainedModel", device: torch.device, resting: torch.device) -> None:
    """Allocate what is on meta: parameters on `resting`, still without values; buffers on `device`, with values."""
    _replace(model, lambda p: torch.empty_like(p, device=resting) if p.is_meta else p.to(resting))
    _buffers(model, device)


def _replace(model: nn.Module, make) -> None:
    """Replace parameters module by module. `Module.to_empty` would make two parameters of a tied one."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if old not in replaced:
                replaced[old] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
            module._parameters[name] = replaced[old]


def _buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Move buffers to `device`. Non-persistent ones (rotary frequencies) are in no file: the model computes them."""
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
    """Compute buffers by the model's initialisation, twice, from different values: one that depends on the values that
    were there is not computed at all."""
    for parameter in module.parameters(recurse=False):
        # fill() loads the values: no random number is to be drawn for them here
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    results: list[dict[str, Tensor]] = []
    for start in (0, 1):
        for name in waiting:
            _buffer(module, name).fill_(start)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model._init_weights(module)
        results.append({name: _buffer(module, name).clone() for name in waiting})
    for name in waiting:
        if not torch.equal(results[0][name], results[1][name]):
            raise PlanError(
                f"{type(model).__name__}: the buffer {name!r} of {type(module).__name__} is in no checkpoint and the "
                "model's initialisation does not compute it; load the model yourself and give compose() the live model"
            )


def _buffer(module: nn.Module, name: str) -> Tensor:
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer
