"""Experts of which each rank has some: their parameters as plain tensors, and rows that other ranks sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from treering.core.module_forward import ModuleForward


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Rows that other ranks sent to the experts of this one. `counted`: [R] which of them count for observers."""

    counted: Tensor


class LocalExperts(ModuleForward):
    """Called in place of the forward of a module inside dispatched experts that FSDP gathers by itself: an adapter."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with shown_local(self.module):
            return self.call_former(*args, **kwargs)


@contextmanager
def shown_local(module: nn.Module) -> Iterator[None]:
    """Show the rows of this rank's experts in place of parameters that are sharded over `expert` alone.

    They are put straight into the dictionaries that hold parameters, and afterwards the same objects are back. What
    FSDP has not gathered is sharded over more axes, and stays.
    """
    places: list[tuple[dict[str, Any], str]] = [
        (m._parameters, name) for m in module.modules() for name in m._parameters
    ]
    before = [
        (holder, name, parameter)
        for holder, name in places
        if isinstance(parameter := holder[name], DTensor) and parameter.device_mesh.mesh_dim_names == ("expert",)
    ]
    for holder, name, parameter in before:
        holder[name] = parameter.to_local()
    try:
        yield
    finally:
        for holder, name, parameter in before:
            holder[name] = parameter
