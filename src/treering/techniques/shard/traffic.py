"""The messages of fully_shard in a step, from the shapes of its units.

A unit is gathered by one all_gather and its gradients are summed by one reduce_scatter, and by one all_reduce more over
replicas. Rows are padded to the same number on each rank, on the way as in memory.

A unit is gathered for the forward and, where it was freed after it, once more in the backward. Units before the first
that trains have no backward; the last of these is gathered in the backward all the same, because each unit that has one
asks for the unit before it ahead of time. In a frozen run nothing has a backward; a unit that is not freed after its
forward is then counted for each pass, though it stays gathered until something resets the model.

Stacked experts that are assigned to ranks add the exchange of rows of tokens, `treering.experts.dispatch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from treering.core.sharded import local
from treering.core.topology import axes_of
from treering.technique import Collective, Message, Workload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.techniques.shard.settings import ShardSettings


@dataclass(frozen=True, kw_only=True)
class ShardedUnit:
    """One unit of fully_shard. Bytes are those that one rank gives to a collective.

    Attributes:
        mesh: That of `fully_shard`: of all parameters of one copy, or, of experts, of the ranks with the same ones.
        gathered: Of its rows of all parameters, in the dtype of the arithmetic.
        reduced: Of the complete gradients of the parameters that train, in the dtype in which they are summed.
        kept: Gathered once per micro-batch, because it is not freed between forward and backward.
    """

    mesh: "DeviceMesh"
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
        parameters = {p for module in modules for p in module.parameters() if not taken(p)}
        gathered = reduced = 0
        for p in parameters:
            here = local(p)
            rows = -(-here.shape[0] // ranks) * (here.numel() // max(here.shape[0], 1))
            dtype = compute or p.dtype
            gathered += rows * dtype.itemsize
            if p.requires_grad:
                reduced += rows * ranks * (reduce or dtype).itemsize
        return cls(mesh=mesh, gathered=gathered, reduced=reduced, kept=kept)


def taken(parameter: torch.Tensor) -> bool:
    """Return whether a unit has the parameter already: it is sharded, and not only over the axis `expert`."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names != ("expert",)


def is_of_experts(parameter: torch.Tensor) -> bool:
    """Return whether the parameter is of experts that are assigned to ranks."""
    return isinstance(parameter, DTensor) and "expert" in (parameter.device_mesh.mesh_dim_names or ())


@dataclass(frozen=True, kw_only=True)
class ShardTraffic:
    """The units of a model in the order in which their forwards end."""

    units: tuple[ShardedUnit, ...]
    config: "ShardSettings"
    dispatches: tuple["Dispatch", ...] = ()
    head: int | None = None  # the unit that stays gathered where the model is its own teacher

    def messages(self, work: Workload) -> list[Message]:
        """Return what a rank sends in a step of `work`; nothing over axes of one rank."""
        passes = 1 if self.config.hold == "all" else work.micro_batches
        first = next((i for i, unit in enumerate(self.units) if unit.reduced), len(self.units))
        gathers = [
            passes * (1 if unit.kept or i < first - 1 or first == len(self.units) else 2)
            for i, unit in enumerate(self.units)
        ]
        if work.own_teacher:
            gathers = [n if unit.kept else n + passes for n, unit in zip(gathers, self.units)]
            gathers = [passes if i == self.head else n for i, n in enumerate(gathers)]
        messages = []
        for mesh in dict.fromkeys(unit.mesh for unit in self.units):
            messages += self._of_mesh(mesh, gathers, work)
        return [*messages, *_dispatched(self.dispatches, work)]

    def _of_mesh(self, mesh: "DeviceMesh", gathers: Sequence[int], work: Workload) -> list[Message]:
        of_mesh = [(unit, n) for unit, n in zip(self.units, gathers) if unit.mesh == mesh]
        axis = mesh.ndim - 1
        gathered = sum(unit.gathered * n for unit, n in of_mesh)
        messages = _messages("all_gather", mesh, axis, gathered, sum(n for _, n in of_mesh), "parameters")
        sums = 1 if self.config.hold != "nothing" else work.micro_batches
        reduced = sum(unit.reduced for unit, _ in of_mesh) * sums
        calls = sum(unit.reduced > 0 for unit, _ in of_mesh) * sums
        messages += _messages("reduce_scatter", mesh, axis, reduced, calls, "gradients")
        if axis:
            messages += _messages("all_reduce", mesh, 0, reduced // mesh.size(axis), calls, "gradients")
        return messages


def _messages(kind: Collective, mesh: "DeviceMesh", axis: int, size: int, calls: int, content: str) -> list[Message]:
    ranks = mesh.size(axis)
    if ranks == 1 or not calls:
        return []
    return [
        Message(
            kind=kind,
            axes=axes_of(mesh, axis),
            ranks=ranks,
            bytes=size,
            calls=calls,
            content=content,
            overlaps=True,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The messages of one layer of experts, as if its tokens chose all experts equally often.

    Attributes:
        ranks: Over which experts are assigned.
        experts: Of all ranks.
        choices: Experts of a token.
        row, result: Bytes of what is sent for a row, and of what comes back.
        forwards: Passes forward: 2 where a block is computed again in the backward.
        rows_learn, results_learn: Whether rows, and results, have a gradient, which goes the other way.
    """

    ranks: int
    experts: int
    choices: int
    row: int
    result: int
    forwards: int
    rows_learn: bool
    results_learn: bool

    def sent(self, work: Workload) -> tuple[int, int, int, int]:
        """Return (calls, bytes) of rows of tokens in a step of `work`, and those of the counts before them."""
        forwards = self.forwards + work.own_teacher
        out, back = forwards + self.rows_learn, forwards + self.results_learn
        away = work.tokens * self.choices * (self.ranks - 1) // self.ranks
        counts = self.experts * (self.ranks - 1) // self.ranks * 4
        each = (out + back, away * (out * self.row + back * self.result), forwards, forwards * counts)
        calls, size, *of_counts = (value * work.micro_batches for value in each)
        return calls, size, of_counts[0], of_counts[1]


def _dispatched(dispatches: Sequence[Dispatch], work: Workload) -> list[Message]:
    if not dispatches:
        return []
    calls, size, count_calls, count_size = (sum(values) for values in zip(*(one.sent(work) for one in dispatches)))
    kinds = ((calls, size, "rows of tokens"), (count_calls, count_size, "numbers of rows"))
    return [
        Message(
            kind="all_to_all",
            axes=("expert",),
            ranks=dispatches[0].ranks,
            bytes=bytes_,
            calls=calls_,
            content=content,
        )
        for calls_, bytes_, content in kinds
    ]
