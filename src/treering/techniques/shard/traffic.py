"""The messages of fully_shard in a step, from the shapes of its units.

A unit is gathered by one all_gather and its gradients are summed by one reduce_scatter, and by one all_reduce more over
replicas. Rows are padded to the same number on each rank, on the way as in memory.

A unit is gathered for the forward and, where it was freed after it, once more in the backward. Units before the first
that trains have no backward; the last of these is gathered in the backward all the same, because each unit that has one
asks for the unit before it ahead of time. In a frozen run nothing has a backward; a unit that is not freed after its
forward is then counted for each pass, though it stays gathered until something resets the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from treering.core.topology import axes_of
from treering.technique import Message, Workload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.techniques.shard.settings import ShardSettings


@dataclass(frozen=True, kw_only=True)
class ShardedUnit:
    """One unit of fully_shard. Bytes are those that one rank gives to a collective.

    Attributes:
        gathered: Of its rows of all parameters, in the dtype of the arithmetic.
        reduced: Of the complete gradients of the parameters that train, in the dtype in which they are summed.
        kept: Gathered once per micro-batch, because it is not freed between forward and backward.
    """

    gathered: int
    reduced: int
    kept: bool

    @classmethod
    def of(
        cls,
        modules: Sequence[nn.Module],
        mesh: "DeviceMesh",
        *,
        compute: torch.dtype | None,
        reduce: torch.dtype | None,
        kept: bool,
    ) -> "ShardedUnit":
        """Return the unit of the parameters of `modules` that no other unit has taken yet."""
        ranks = mesh.size(mesh.ndim - 1)
        parameters = {p for module in modules for p in module.parameters() if not isinstance(p, DTensor)}
        gathered = reduced = 0
        for p in parameters:
            rows = -(-p.shape[0] // ranks) * (p.numel() // max(p.shape[0], 1))
            dtype = compute or p.dtype
            gathered += rows * dtype.itemsize
            if p.requires_grad:
                reduced += rows * ranks * (reduce or dtype).itemsize
        return cls(gathered=gathered, reduced=reduced, kept=kept)


@dataclass(frozen=True, kw_only=True)
class ShardTraffic:
    """The units of a model in the order in which their forwards end."""

    units: tuple[ShardedUnit, ...]
    mesh: "DeviceMesh"
    config: "ShardSettings"

    def messages(self, work: Workload) -> list[Message]:
        """Return what a rank sends in a step of `work`; nothing over axes of one rank."""
        passes = 1 if self.config.hold == "all" else work.micro_batches
        first = next((i for i, unit in enumerate(self.units) if unit.reduced), len(self.units))
        gathers = [
            passes * (1 if unit.kept or i < first - 1 or first == len(self.units) else 2)
            for i, unit in enumerate(self.units)
        ]
        axis = self.mesh.ndim - 1
        gathered = sum(unit.gathered * n for unit, n in zip(self.units, gathers))
        messages = self._messages("all_gather", axis, gathered, sum(gathers), "parameters")
        sums = 1 if self.config.hold != "nothing" else work.micro_batches
        reduced, calls = sum(u.reduced for u in self.units) * sums, sum(u.reduced > 0 for u in self.units) * sums
        messages += self._messages("reduce_scatter", axis, reduced, calls, "gradients")
        if axis:
            messages += self._messages("all_reduce", 0, reduced // self.mesh.size(axis), calls, "gradients")
        return messages

    def _messages(self, kind, axis: int, size: int, calls: int, content: str) -> list[Message]:
        ranks = self.mesh.size(axis)
        if ranks == 1 or not calls:
            return []
        axes = axes_of(self.mesh, axis)
        return [Message(kind=kind, axes=axes, ranks=ranks, bytes=size, calls=calls, content=content)]
