"""The messages that protection sends in a step, from shapes: gradients are projected before it, changes after it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.tensor import DTensor

from treering.core.sharded import sharded_axes
from treering.core.topology import axes_of
from treering.technique import Collective, Message

if TYPE_CHECKING:
    from treering.techniques.osft.forward_factors.communication import Projection
    from treering.techniques.osft.update.cached_operators import CachedOperators
    from treering.techniques.osft.update.operator_buffers import OperatorBuffers

PASSES = 2


def of_factors(projections: "Iterable[Projection]") -> list[Message]:
    """Return what `communication.project_` sends in a step. A basis that is cached was gathered in the first step."""
    from treering.techniques.osft.forward_factors.communication import GatheredBasis, SummedCoefficients, plan_messages

    def each() -> Iterator[Message]:
        for message in plan_messages(projections):
            if isinstance(message, SummedCoefficients):
                yield from _messages("all_reduce", message.projections[0].value, message.bytes, "coefficients")
            elif isinstance(message, GatheredBasis) and message.projection.cache is None:
                yield from _gathered(message.projection.basis)

    return _merged(each())


def of_update(
    weights: Mapping[str, Tensor], operators: "Mapping[str, OperatorBuffers]", cached: "CachedOperators | None"
) -> list[Message]:
    """Return what the projections of form `update` send: operators are gathered, or rows are sent to the owners and
    back. What an owner caches was sent in the first step."""

    def each() -> Iterator[Message]:
        exchanged, gathered = set(cached.owner) if cached is not None else set(), set[int]()
        for name, one in operators.items():
            if name not in exchanged:
                yield from _projected(one, weights[name], gathered)
        if cached is not None:
            for weight, sent, returned in cached.exchanges():
                yield from _messages("all_to_all", weight, sent, "rows")
                yield from _messages("all_to_all", weight, returned, "rows")

    return _merged(each())


def of_merging(factors: "Iterable[Tensor]") -> list[Message]:
    """Return what form `merged` sends after a step: the factor of each step that acts on columns is gathered."""
    messages = [message for factor in factors for message in _gathered(factor)]
    return _merged(messages, times=1)


def _projected(operators: "OperatorBuffers", weight: Tensor, gathered: set[int]) -> Iterator[Message]:
    """Yield the messages of one pass over one weight: see `OperatorBuffers.project`. Experts need none.

    Args:
        gathered: whose operators are there already, for weights that share them; this weight's are added.
    """
    if weight.ndim != 2:
        return
    width = weight.shape[1]
    columns = operators.shapes.get(operators.columns)
    if columns is not None:
        name = operators.basis(operators.columns)
        if id(operators.source) not in gathered:
            gathered.add(id(operators.source))
            yield from _gathered(operators.buffer(name))
        if columns.rest == 0 and name == f"Q_{columns.end}":
            width = columns.columns
    if operators.rows in operators.shapes:
        basis = operators.buffer(operators.basis(operators.rows))
        yield from _messages("all_reduce", weight, basis.shape[-1] * width * basis.itemsize, "coefficients")


def _gathered(basis: Tensor) -> Iterator[Message]:
    """Yield the messages of a gather of all rows, padded to the same number on each rank, the innermost axis first."""
    rows = basis.shape[0]
    for axis in sharded_axes(basis):
        rows = -(-rows // basis.device_mesh.size(axis))  # type: ignore[attr-defined]
        size = rows * (basis.numel() // basis.shape[0]) * basis.itemsize
        yield from _messages("all_gather", basis, size, "bases", axis=axis)


def _messages(kind: Collective, value: Tensor, size: int, content: str, axis: int | None = None) -> Iterator[Message]:
    """Yield one message over each axis, of several ranks, that `value` is sharded over."""
    if not isinstance(value, DTensor):
        return
    mesh = value.device_mesh
    for one in sharded_axes(value) if axis is None else (axis,):
        if mesh.size(one) > 1:
            axes = axes_of(mesh, one)
            yield Message(kind=kind, axes=axes, ranks=mesh.size(one), bytes=size, calls=1, content=content)


def _merged(messages: Iterable[Message], times: int = PASSES) -> list[Message]:
    """Return the messages of so many passes, those of one kind as one."""
    sums: dict[tuple[str, tuple[str, ...], str], Message] = {}
    for one in messages:
        key = one.kind, one.axes, one.content
        so_far = sums.get(key, replace(one, bytes=0, calls=0))
        sums[key] = replace(so_far, bytes=so_far.bytes + times * one.bytes, calls=so_far.calls + times * one.calls)
    return list(sums.values())
