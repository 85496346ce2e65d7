"""Projections that keep sharded factors orthogonal to a basis, with as few bytes between ranks as possible.

A factor is stored D×k, so that FSDP2, which shards dimension 0, shards D. Then Qᵀ X is a sum over ranks of what each
has, and (I − Q Qᵀ) X is local once that sum, k_h×k_l, is known (`coefficients`): the sums of many factors are sent as
one flat buffer, and the next is computed while one is on its way. Inside a basis B of the trainable directions k_l×k_l
is enough: (I − Q Qᵀ) = B Bᵀ, if Q and B together are all directions.

Stored k×D (`turned`), each rank has complete rows, and needs the complete basis: gathered each time, or gathered once
and cached. Experts have one matrix each, which is complete on its rank, so they need nothing.

The ranks are those of the parameter's own mesh, never the world: replicas have the same rows already.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.full_precision import full_precision
from treering.core.sharded import Groups, TensorCache, local, row_groups, start_gather

BUCKET = 64 << 20  # bytes of coefficients in one message


@dataclass(frozen=True, eq=False)
class Projection:
    """`value` is to be orthogonal to `basis`, or, `inside`, to lie in its span.

    Attributes:
        turned: both are k×D.
        cache: keeps the gathered basis; None: it is gathered each time.
    """

    value: Tensor
    basis: Tensor
    inside: bool = False
    turned: bool = False
    cache: TensorCache | None = None

    @property
    def coefficients(self) -> torch.Size:
        """The shape of Qᵀ X."""
        return torch.Size((self.basis.shape[-1], self.value.shape[-1]))

    @property
    def weights(self) -> dict[str, int]:
        """The factors of X and of its part in the span of the basis, for `addmm_`."""
        return {"beta": 0, "alpha": 1} if self.inside else {"beta": 1, "alpha": -1}

    def local_basis(self) -> Tensor:
        """Return this rank's rows of the basis, on the device of the value."""
        return local(self.basis).to(local(self.value).device)


@torch.no_grad()
def project_(projections: Iterable[Projection], *, bucket: int = BUCKET) -> None:
    """Project every value in place. A collective over the ranks that share its rows; the same order on all."""
    with full_precision():
        _one_ahead(plan_messages(projections, bucket))


class PlannedMessage(Protocol):
    def start(self) -> None: ...
    def finish(self) -> None: ...


def _one_ahead(messages: Iterable[PlannedMessage]) -> None:
    waiting: PlannedMessage | None = None
    for message in messages:
        message.start()
        if waiting is not None:
            waiting.finish()
        waiting = message
    if waiting is not None:
        waiting.finish()


def plan_messages(projections: Iterable[Projection], bucket: int = BUCKET) -> "Iterator[PlannedMessage]":
    """Yield the messages of a projection, in the order in which they are sent."""
    filling: dict[tuple[Any, ...], SummedCoefficients] = {}
    for projection in projections:
        value, groups = projection.value, row_groups(projection.value)
        if projection.turned:
            yield GatheredBasis(projection)
        elif value.ndim == 3 or not groups:
            yield _NoMessage(projection)
        else:
            key = (groups, value.dtype, local(value).device)
            if key in filling and filling[key].bytes + projection.coefficients.numel() * value.itemsize > bucket:
                yield filling.pop(key)
            filling.setdefault(key, SummedCoefficients(groups)).add(projection)
    yield from filling.values()


class SummedCoefficients:
    """One flat all-reduce of the coefficients of several projections."""

    def __init__(self, groups: Groups):
        self.groups, self.bytes = groups, 0
        self.projections: list[Projection] = []

    def add(self, projection: Projection) -> None:
        self.projections.append(projection)
        self.bytes += projection.coefficients.numel() * projection.value.itemsize

    def start(self) -> None:
        first = local(self.projections[0].value)
        self.flat = first.new_empty(self.bytes // first.itemsize)
        for projection, coefficients in zip(self.projections, self._views()):
            torch.mm(projection.local_basis().T, local(projection.value), out=coefficients)
        self.work = dist.all_reduce(self.flat, group=self.groups[0], async_op=True)

    def finish(self) -> None:
        self.work.wait()
        for group in self.groups[1:]:
            dist.all_reduce(self.flat, group=group)
        for projection, coefficients in zip(self.projections, self._views()):
            X = local(projection.value)
            X.addmm_(projection.local_basis(), coefficients, **projection.weights)
        del self.flat, self.work

    def _views(self) -> Iterator[Tensor]:
        start = 0
        for projection in self.projections:
            shape = projection.coefficients
            yield self.flat[start : start + shape.numel()].view(shape)
            start += shape.numel()


@dataclass
class _NoMessage:
    """All rows are on this rank, or each matrix is complete."""

    projection: Projection

    def start(self) -> None: ...

    def finish(self) -> None:
        X, Q = local(self.projection.value), self.projection.local_basis()
        inside = Q @ (Q.mT @ X)
        X.copy_(inside) if self.projection.inside else X.sub_(inside)


class GatheredBasis:
    """This rank has complete rows of the value, and the basis is gathered, or was cached."""

    def __init__(self, projection: Projection):
        self.projection = projection
        self.complete: Callable[[], Tensor] | None = None

    def start(self) -> None:
        cache, basis = self.projection.cache, self.projection.basis
        cached = cache is not None and cache.valid(basis)
        self.complete = (lambda: cache.value) if cache is not None and cached else start_gather(basis)

    def finish(self) -> None:
        assert self.complete is not None
        complete, cache, basis = self.complete(), self.projection.cache, self.projection.basis
        if cache is not None and not cache.valid(basis) and row_groups(basis):
            cache.keep(complete, basis)
        X = local(self.projection.value)
        Q = complete.to(X.device)
        X.addmm_(X @ Q.T, Q, **self.projection.weights)
        self.complete = None
