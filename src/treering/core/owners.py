"""Ownership among ranks: work assigned to ranks, and rows of matrices exchanged with the rank that owns each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.sharded import local

Name = TypeVar("Name", int, str, tuple[str, int])


def assign(
    costs: Mapping[Name, float],
    ranks: int,
    *,
    most: int | None = None,
    may_own: Callable[[Name, int], bool] = lambda name, rank: True,
) -> dict[Name, int]:
    """Return the rank of each name: the costliest first, each to the rank with the least so far; ties by name.

    The names come in the order in which they were assigned.

    Args:
        costs: the cost of each name.
        ranks: how many ranks there are.
        most: how many names a rank is given at most. With fewer places than names there is a ValueError.
        may_own: whether a name may be assigned to a rank. For each name there is a rank that may own it.

    >>> assign({"a": 1, "b": 5, "c": 3, "d": 3}, 2)
    {'b': 0, 'c': 1, 'd': 1, 'a': 0}
    """
    load, given = [0.0] * ranks, [0] * ranks
    owners: dict[Name, int] = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        candidates = [rank for rank in range(ranks) if given[rank] != most and may_own(name, rank)]
        owner = owners[name] = min(candidates, key=load.__getitem__)
        load[owner] += costs[name]
        given[owner] += 1
    return owners


@dataclass(frozen=True)
class MatrixRows:
    """This rank's rows of a matrix that has `total` rows, sharded as FSDP shards."""

    rows: Tensor
    total: int

    @classmethod
    def of(cls, value: Tensor) -> "MatrixRows":
        return cls(local(value), value.shape[0])

    def elements(self, ranks: int) -> list[int]:
        """Return the number of elements on each rank."""
        each, width = -(-self.total // ranks), self.rows.shape[1]
        return [width * (min((rank + 1) * each, self.total) - min(rank * each, self.total)) for rank in range(ranks)]


class RowExchange:
    """Matrices of which each rank of `group` owns at most one: their rows are sent to the owners, and back.

    Args:
        group: the process group over which the rows of all these matrices are sharded.
        by_owner: the rank that owns a matrix -> this rank's rows of it. The same owners on all ranks.
    """

    def __init__(self, group: Any, by_owner: Mapping[int, MatrixRows]):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self.parts = [by_owner[owner] for owner in sorted(by_owner)]
        self.owned = by_owner.get(rank)
        self.sent = [by_owner[r].rows.numel() if r in by_owner else 0 for r in range(ranks)]
        self.received = [0] * ranks if self.owned is None else self.owned.elements(ranks)

    def sent_bytes(self) -> tuple[int, int]:
        """Return the bytes that this rank sends to other ranks in `collect` and in `deliver`."""
        rank, size = dist.get_rank(self.group), self.parts[0].rows.itemsize
        return tuple((sum(counts) - counts[rank]) * size for counts in (self.sent, self.received))  # type: ignore[return-value]

    def collect(self) -> Tensor | None:
        """Return the complete matrix that this rank owns, if it owns one. A collective."""
        rows = torch.cat([part.rows.reshape(-1) for part in self.parts])
        complete = rows.new_empty(sum(self.received))
        dist.all_to_all_single(complete, rows, self.received, self.sent, group=self.group)
        return None if self.owned is None else complete.view(self.owned.total, -1)

    def deliver(self, complete: Tensor | None) -> None:
        """Replace this rank's rows by those of the matrices as their owners now have them. A collective."""
        rows = self.parts[0].rows.new_empty(sum(self.sent))
        owned = rows.new_empty(0) if complete is None else complete.reshape(-1)
        dist.all_to_all_single(rows, owned, self.sent, self.received, group=self.group)
        for part, returned in zip(self.parts, rows.split([part.rows.numel() for part in self.parts])):
            part.rows.copy_(returned.view_as(part.rows))
