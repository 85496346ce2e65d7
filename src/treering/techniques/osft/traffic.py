"""What protection sends in a step, from shapes: the gradients are projected before it and the change after it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.tensor import DTensor

from treering.core.sharded import sharded_axes
from treering.core.topology import axes_of
from treering.technique import Collective, Message
from treering.techniques.osft import wire
from treering.techniques.osft.owners import rounds_of

if TYPE_CHECKING:
    from treering.techniques.osft.held import Held
    from treering.techniques.osft.owners import Owners

PASSES = 2


def of_factors(sides: Iterable[wire.Side]) -> list[Message]:
    """Return what `wire.project_` sends for `sides` in a step. A basis that is kept was gathered in the first step."""

    def each() -> Iterator[Message]:
        for job in wire._jobs(sides, wire.BUCKET):
            if isinstance(job, wire._Sum):
                yield from _messages("all_reduce", job.sides[0].value, job.bytes, "coefficients")
            elif isinstance(job, wire._Gather) and job.side.kept is None:
                yield from _gathered(job.side.basis)

    return _together(each())


def of_update(weights: Mapping[str, Tensor], held: "Mapping[str, Held]", owners: "Owners | None") -> list[Message]:
    """Return what the projections of form `update` send: operators are gathered, or rows go to their owners and back.
    What an owner keeps was sent in the first step."""

    def each() -> Iterator[Message]:
        travelling = set(owners.owner) if owners is not None else set()
        for name, one in held.items():
            if name not in travelling:
                yield from _projected(one, weights[name])
        if owners is not None:
            for of, sent, back in rounds_of(owners, {name: weights[name] for name in travelling}):
                yield from _messages("all_to_all", of, sent, "rows")
                yield from _messages("all_to_all", of, back, "rows")

    return _together(each())


def _projected(held: "Held", weight: Tensor) -> Iterator[Message]:
    """One pass over one weight: see `Held.project`. Experts are whole matrices on their rank."""
    if weight.ndim != 2:
        return
    width = held.target.shape[1]
    columns = held.sides.get(held.columns)
    if columns is not None:
        basis = held.held(held.basis(held.columns))
        yield from _gathered(basis)
        if columns.rest == 0 and held.basis(held.columns).startswith("Q_"):
            width = columns.columns
    if held.rows in held.sides:
        basis = held.held(held.basis(held.rows))
        yield from _messages("all_reduce", weight, basis.shape[-1] * width * basis.itemsize, "coefficients")


def _gathered(basis: Tensor) -> Iterator[Message]:
    """A gather of the rows of all ranks, padded to the same number on each, the innermost axis first."""
    rows = basis.shape[0]
    for axis in sharded_axes(basis):
        rows = -(-rows // basis.device_mesh.size(axis))  # type: ignore[attr-defined]
        size = rows * (basis.numel() // basis.shape[0]) * basis.itemsize
        yield from _messages("all_gather", basis, size, "bases", axis=axis)


def _messages(kind: Collective, value: Tensor, size: int, content: str, axis: int | None = None) -> Iterator[Message]:
    """One message over each axis, of several ranks, that `value` is sharded over."""
    if not isinstance(value, DTensor):
        return
    mesh = value.device_mesh
    for one in sharded_axes(value) if axis is None else (axis,):
        if mesh.size(one) > 1:
            axes = axes_of(mesh, one)
            yield Message(kind=kind, axes=axes, ranks=mesh.size(one), bytes=size, calls=1, content=content)


def _together(messages: Iterable[Message]) -> list[Message]:
    """Return the messages of both passes, those of one kind as one."""
    sums: dict[tuple[str, tuple[str, ...], str], Message] = {}
    for one in messages:
        key = one.kind, one.axes, one.content
        so_far = sums.get(key, replace(one, bytes=0, calls=0))
        sums[key] = replace(so_far, bytes=so_far.bytes + PASSES * one.bytes, calls=so_far.calls + PASSES * one.calls)
    return list(sums.values())
