"""A process group that counts what it is given: the collectives, and the bytes that this rank sends to others.

It is a backend of torch.distributed, so that whatever code uses the group is counted alike: operators of torch or of a
package, functional collectives, a backward. What it does not know raises an error instead of being left out.

    register()
    group = dist.new_group(ranks, backend="recording")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

BACKEND = "recording"


@dataclass(frozen=True)
class Call:
    kind: str
    bytes: int


class RecordingGroup(dist.ProcessGroup):
    """gloo, counted. A gather sends each rank's part to every other one, in a ring or not."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self.inner = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.calls: list[Call] = []

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def _set_group_name(self, name: str) -> None: ...

    def _set_group_desc(self, description: str) -> None: ...

    def all_to_all_single(
        self, output: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Any:
        own = sent[self.rank()] if sent else len(given) // self.size()
        rest = given.nbytes - given[:own].nbytes
        self.calls.append(Call("all_to_all", rest))
        return self.inner.alltoall_base(output, given, received, sent, options)

    def all_gather_single(self, output: Tensor, given: Tensor, options: Any) -> Any:
        self.calls.append(Call("all_gather", (self.size() - 1) * given.nbytes))
        return self.inner._allgather_base(output, given, options)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], given: Sequence[Tensor], options: Any) -> Any:
        self.calls.append(Call("all_gather", (self.size() - 1) * sum(x.nbytes for x in given)))
        return self.inner.allgather(outputs, given, options)

    # Before torch 2.13.
    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single


def register() -> None:
    """Make the backend known to this process."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, RecordingGroup, devices=["cpu"])


def taken(groups: Sequence[Any]) -> list[Call]:
    """Return what was counted since the last time, and forget it."""
    calls = [call for group in groups for call in group.calls]
    for group in groups:
        group.calls.clear()
    return calls
