"""Keeping rows that are dealt over ranks orthogonal to a basis, with as few bytes as it takes.

A factor is stored D×k, so that FSDP2, which deals dimension 0, deals D. Then Qᵀ X is a sum over ranks of what each has,
and (I − Q Qᵀ) X is local once that sum, k_h×k_l, is known (`coefficients`): many factors' sums travel as one flat
buffer, and the next is computed while one is on its way. Inside a basis B that was kept of the free directions, k_l×k_l
is enough: (I − Q Qᵀ) = B Bᵀ, if Q and B together are all directions.

Stored k×D (`turned`), each rank has whole rows, and needs the whole basis: gathered each time, or gathered once and
kept. Experts have one matrix each and are dealt whole, so they need nothing.

The ranks are those of the parameter's own mesh, never the world: replicas have the same rows already.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from treering.core.full_precision import exactly
from treering.core.sharded import local, sharded_axes

BUCKET = 64 << 20  # bytes of coefficients in one message


class Kept:
    """A gathered basis, for as long as what it was gathered from is neither replaced nor written to.

    Not a buffer: it is in no state_dict. Ranks agree, because all of them write to a parameter or none does.
    """

    def __init__(self) -> None:
        self.whole: Tensor | None = None
        self._of: tuple[Tensor, int] | None = None

    def fits(self, rows: Tensor) -> bool:
        """FSDP shows a parameter as a new object each time: the memory is what stays, as long as it is held here."""
        if self._of is None:
            return False
        of, version = self._of
        return (of.data_ptr(), of.shape, version) == (rows.data_ptr(), rows.shape, rows._version)

    def keep(self, rows: Tensor, whole: Tensor) -> None:
        self.whole, self._of = whole, (rows, rows._version)


@dataclass(frozen=True, eq=False)
class Side:
    """`value` is to be orthogonal to `basis`, or, `inside`, to lie in its span."""

    value: Tensor
    basis: Tensor
    inside: bool = False
    turned: bool = False  # both are k×D
    kept: Kept | None = None


@torch.no_grad()
def project_(sides: Iterable[Side], *, bucket: int = BUCKET) -> None:
    """Project every side's value in place. A collective over the ranks that share its rows; the same order on all."""
    with exactly():
        _one_ahead(_jobs(sides, bucket))


def groups(value: Tensor) -> tuple[Any, ...]:
    """The process groups over which dimension 0 of `value` is dealt, the outermost first; none where it is whole."""
    if not isinstance(value, DTensor):
        return ()
    mesh = value.device_mesh
    return tuple(mesh.get_group(axis) for axis in sharded_axes(value) if mesh.size(axis) > 1)


class _Job(Protocol):
    def start(self) -> None: ...
    def finish(self) -> None: ...


def _one_ahead(jobs: Iterable[_Job]) -> None:
    waiting: _Job | None = None
    for job in jobs:
        job.start()
        if waiting is not None:
            waiting.finish()
        waiting = job
    if waiting is not None:
        waiting.finish()


def _jobs(sides: Iterable[Side], bucket: int) -> Iterator[_Job]:
    filling: dict[tuple[Any, ...], _Sum] = {}
    for side in sides:
        over = groups(side.value)
        if side.turned:
            yield _Gather(side)
        elif side.value.ndim == 3 or not over:
            yield _Local(side)
        else:
            key = (over, side.value.dtype, local(side.value).device)
            if key in filling and filling[key].bytes + coefficients(side).numel() * side.value.itemsize > bucket:
                yield filling.pop(key)
            filling.setdefault(key, _Sum(over)).add(side)
    yield from filling.values()


def coefficients(side: Side) -> torch.Size:
    """The shape of Qᵀ X."""
    return torch.Size((side.basis.shape[-1], side.value.shape[-1]))


class _Sum:
    """One flat all-reduce of the coefficients of several sides."""

    def __init__(self, over: tuple[Any, ...]):
        self.over, self.bytes = over, 0
        self.sides: list[Side] = []

    def add(self, side: Side) -> None:
        self.sides.append(side)
        self.bytes += coefficients(side).numel() * side.value.itemsize

    def start(self) -> None:
        first = local(self.sides[0].value)
        self.flat = first.new_empty(self.bytes // first.itemsize)
        for side, own in zip(self.sides, self._views()):
            torch.mm(_basis(side).T, local(side.value), out=own)
        self.work = dist.all_reduce(self.flat, group=self.over[0], async_op=True)

    def finish(self) -> None:
        self.work.wait()
        for group in self.over[1:]:
            dist.all_reduce(self.flat, group=group)
        for side, own in zip(self.sides, self._views()):
            X = local(side.value)
            X.addmm_(_basis(side), own, beta=0 if side.inside else 1, alpha=1 if side.inside else -1)
        del self.flat, self.work

    def _views(self) -> Iterator[Tensor]:
        start = 0
        for side in self.sides:
            shape = coefficients(side)
            yield self.flat[start : start + shape.numel()].view(shape)
            start += shape.numel()


@dataclass
class _Local:
    """All rows are here, or each matrix is whole."""

    side: Side

    def start(self) -> None: ...

    def finish(self) -> None:
        X, Q = local(self.side.value), _basis(self.side)
        inside = Q @ (Q.mT @ X)
        X.copy_(inside) if self.side.inside else X.sub_(inside)


class _Gather:
    """Whole rows are here, and the basis comes from everywhere; from memory, if it was kept."""

    def __init__(self, side: Side):
        self.side = side
        self.levels = _levels(side.basis)
        self.work: Any = None
        self.whole: Tensor | None = None

    def start(self) -> None:
        rows, kept = local(self.side.basis), self.side.kept
        if kept is not None and kept.fits(rows):
            self.whole = kept.whole
        elif not self.levels:
            self.whole = rows
        else:
            self.whole, self.work = _gathering(rows, self.levels[-1])

    def finish(self) -> None:
        assert self.whole is not None
        if self.work is not None:
            self.work.wait()
            self.whole = self.whole[: self.levels[-1].rows]
            for level in reversed(self.levels[:-1]):
                self.whole, work = _gathering(self.whole, level)
                work.wait()
                self.whole = self.whole[: level.rows]
            if self.side.kept is not None:
                self.side.kept.keep(local(self.side.basis), self.whole)
        X = local(self.side.value)
        Q = self.whole.to(X.device)
        coefficients = X @ Q.T
        X.addmm_(coefficients, Q, beta=0 if self.side.inside else 1, alpha=1 if self.side.inside else -1)
        self.whole = None


@dataclass(frozen=True)
class _Level:
    rows: int  # of what this axis deals
    each: int  # that a rank of it gets, the last ones fewer or none
    group: Any


def _levels(value: Tensor) -> list[_Level]:
    found: list[_Level] = []
    rows = value.shape[0]
    for group in groups(value):
        size = dist.get_world_size(group)
        each = -(-rows // size)
        found.append(_Level(rows, each, group))
        rows = min(each, max(0, rows - each * dist.get_rank(group)))
    return found


def _gathering(rows: Tensor, level: _Level) -> tuple[Tensor, Any]:
    """Each rank's rows, padded to the same number. Padding ends up behind all rows: the short ranks are the last."""
    padded = rows if rows.shape[0] == level.each else rows.new_zeros(level.each, *rows.shape[1:])
    if padded is not rows:
        padded[: rows.shape[0]] = rows
    whole = rows.new_empty(level.each * dist.get_world_size(level.group), *rows.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, padded.contiguous(), group=level.group, async_op=True)


def _basis(side: Side) -> Tensor:
    return local(side.basis).to(local(side.value).device)


def first_row(value: Tensor) -> int:
    """Which row of the whole this rank's first one is."""
    return sum(min(level.each * dist.get_rank(level.group), level.rows) for level in _levels(value))


def sum_together(parts: Sequence[tuple[tuple[Any, ...], Tensor]]) -> None:
    """Sum small tensors in place, each over its own groups: one message per mesh."""
    together: dict[tuple[Any, ...], list[Tensor]] = {}
    for over, value in parts:
        together.setdefault((over, value.dtype), []).append(value)
    for (over, _), values in together.items():
        if over:
            flat = torch.cat([value.reshape(-1) for value in values])
            for group in over:
                dist.all_reduce(flat, group=group)
            for value, summed in zip(values, flat.split([v.numel() for v in values])):
                value.copy_(summed.view_as(value))
