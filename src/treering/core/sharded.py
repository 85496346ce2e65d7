"""The rows of a tensor on this rank, and gathering and summing over the ranks that hold the other rows.

A parameter or buffer is either a plain tensor, complete on every rank, or a DTensor whose dimension 0 is sharded.
FSDP2 shards as `torch.chunk` does: every rank gets ⌈rows / ranks⌉ rows, the last ranks fewer or none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from treering.core.errors import PlanError
from treering.core.row_messages import gather_equal
from treering.core.topology import expert_mesh, parameter_mesh, unit_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Groups = tuple[Any, ...]  # process groups, the outermost axis of the mesh first


def local(value: Tensor) -> Tensor:
    """Return the part of `value` that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


# --- which rows


def sharded_axes(value: Tensor) -> tuple[int, ...]:
    """Return the mesh axes over which dimension 0 is sharded, in the order in which they divide it; () for none.

    Where experts or tensors are sharded over an inner axis before FSDP shards over an outer one, the outer placement is
    a `_StridedShard`. It is not a `Shard`, so code that looks for `Shard` would skip it without an error: the rows of
    such a tensor are contiguous, but the outer axis divides last.
    """
    if not isinstance(value, DTensor):
        return ()
    first: list[int] = []
    last: list[int] = []
    for axis, placement in enumerate(value.placements):
        if isinstance(placement, Replicate):
            continue
        strided = _is_strided(placement)
        if not (strided or isinstance(placement, ShardPlacement)) or getattr(placement, "dim", None) != 0:
            raise PlanError(
                f"a tensor of {tuple(value.shape)} is placed as {placement} on axis {axis} of its mesh; only tensors "
                "whose dimension 0 is sharded can be trained, saved and clipped"
            )
        (last if strided else first).append(axis)
    return (*first, *last)


def _is_strided(placement: Any) -> bool:
    return isinstance(placement, _StridedShard)


@dataclass(frozen=True)
class _Cut:
    """The division, by one mesh axis, of the rows that the axes before it gave to this rank."""

    rows: int  # that are divided
    each: int  # rows for one rank of the axis; the last ones have fewer or none
    start: int  # this rank's first one
    group: Any


def _cuts(value: Tensor) -> list[_Cut]:
    if not isinstance(value, DTensor):
        return []
    cuts, rows, mesh = [], value.shape[0] if value.ndim else 1, value.device_mesh
    for axis in sharded_axes(value):
        if mesh.size(axis) == 1:
            continue
        each = -(-rows // mesh.size(axis))
        start = min(each * mesh.get_local_rank(axis), rows)
        cuts.append(_Cut(rows, each, start, mesh.get_group(axis)))
        rows = min(each, rows - start)
    return cuts


def local_rows(value: Tensor) -> tuple[int, int]:
    """Return (start, stop) of the rows of the complete tensor that this rank holds."""
    start, stop = 0, value.shape[0] if value.ndim else 1
    for cut in _cuts(value):
        start, stop = start + cut.start, start + min(cut.start + cut.each, cut.rows)
    return start, stop


def row_groups(value: Tensor) -> Groups:
    """Return the process groups over which dimension 0 of `value` is sharded; () where this rank holds all rows."""
    return tuple(cut.group for cut in _cuts(value))


def meta_rows(
    shape: tuple[int, ...], dtype: torch.dtype, mesh: "DeviceMesh | None", *, experts: bool = False
) -> Tensor:
    """Return a tensor on the meta device, sharded over `mesh` as `fully_shard` shards a parameter of that shape.

    Args:
        experts: dimension 0 counts experts, so that a mesh that assigns experts to ranks shards it as these.
    """
    if mesh is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    view = expert_mesh(mesh) if experts else None
    if view is None:
        over = parameter_mesh(mesh)
        placements: list[Any] = [*[Replicate()] * (over.ndim - 1), ShardPlacement(0)]
    else:
        unit = unit_mesh(view)
        over = view[(*unit.mesh_dim_names, "expert")]  # type: ignore[misc]
        strided = _StridedShard(0, split_factor=view["expert"].size())
        placements = [*[Replicate()] * (unit.ndim - 1), strided, ShardPlacement(0)]
    strides = torch.empty(shape, device="meta").stride()

    def placed(rows: int) -> Tensor:
        own = torch.empty((rows, *shape[1:]), dtype=dtype, device="meta")
        return DTensor.from_local(own, over, placements, run_check=False, shape=torch.Size(shape), stride=strides)

    start, stop = local_rows(placed(0))
    return placed(stop - start)


# --- writing and gathering rows


@torch.no_grad()
def put(target: Tensor, complete: Tensor) -> None:
    """Copy this rank's rows of the tensor `complete` into `target`, cast to its dtype."""
    start, stop = local_rows(target)
    put_rows(target, complete[start:stop] if target.ndim else complete)


@torch.no_grad()
def put_rows(target: Tensor, rows: Tensor) -> None:
    """Copy `rows`, which are this rank's, into `target`, cast to its dtype."""
    destination = local(target)
    assert destination.shape == rows.shape, f"{tuple(rows.shape)} into {tuple(destination.shape)}"
    destination.copy_(rows)


@torch.no_grad()
def gather(value: Tensor) -> Tensor:
    """Return the complete tensor, on every rank. A collective where `value` is sharded."""
    value = value.detach()
    if not isinstance(value, DTensor):
        return value
    if any(map(_is_strided, value.placements)):  # torch joins such rows only where all parts are equal
        return start_gather(value)()
    return value.full_tensor()


def start_gather(value: Tensor) -> Callable[[], Tensor]:
    """Start to gather the rows of all ranks; the returned function waits for them and returns the complete tensor.

    A collective, which runs while this rank computes something else. A tensor that is not sharded is returned as it is.
    """
    rows, cuts = local(value), _cuts(value)
    if not cuts:
        return lambda: rows
    padded, pending = _start_level(rows, cuts[-1])

    def finish() -> Tensor:
        pending.wait()
        complete = padded[: cuts[-1].rows]
        for cut in reversed(cuts[:-1]):
            wider, work = _start_level(complete, cut)
            work.wait()
            complete = wider[: cut.rows]
        return complete

    return finish


def _start_level(rows: Tensor, cut: _Cut) -> tuple[Tensor, Any]:
    """Gather equally many rows of each rank. The padding follows all rows, because the last ranks have fewer."""
    padded = rows
    if rows.shape[0] != cut.each:
        padded = rows.new_zeros(cut.each, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(cut.each * dist.get_world_size(cut.group), *rows.shape[1:])
    return gathered, gather_equal(gathered, padded.contiguous(), cut.group, wait=False)


def settle(model: nn.Module) -> None:
    """Free gathered parameters. After a forward without a backward (evaluation, generation) FSDP may still show
    complete ones, in memory that the next collective frees, where other code expects the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_gathered(module: nn.Module) -> None:
    """Let parameters of `module` stay complete after its forward, until the backward or until they are freed."""
    if isinstance(module, FSDPModule):
        module.set_reshard_after_forward(False, recurse=False)


def end_forward(model: nn.Module) -> None:
    """Free gathered parameters of a model that has no backward, and the order of its forwards, which FSDP records for
    one: it would grow with every forward."""
    if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):  # torch 2.11 has none
        model.reset_iter_state()
    else:
        settle(model)


# --- sums over rows


@torch.no_grad()
def sum_over_rows(value: Tensor, like: Tensor) -> Tensor:
    """Sum `value` in place over the ranks that hold other rows of `like`; replicas are not added. A collective."""
    for group in row_groups(like):
        dist.all_reduce(value, group=group)
    return value


def sum_over_groups(parts: Sequence[tuple[Groups, Tensor]]) -> None:
    """Sum small tensors in place, each over its own process groups: one message for all that share groups and dtype."""
    batches: dict[tuple[Groups, torch.dtype], list[Tensor]] = {}
    for groups, value in parts:
        batches.setdefault((groups, value.dtype), []).append(value)
    for (groups, _), values in batches.items():
        if groups:
            flat = torch.cat([value.reshape(-1) for value in values])
            for group in groups:
                dist.all_reduce(flat, group=group)
            for value, summed in zip(values, flat.split([v.numel() for v in values])):
                value.copy_(summed.view_as(value))


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements that this rank holds, in float64.

    Over 10⁹ elements a float32 sum would lose the digits that a test compares. Each norm is taken in float32, without
    another copy of its tensor.
    """
    filled = [x for x in map(local, tensors) if x.numel()] or [torch.zeros(1, device=local(tensors[0]).device)]
    double = [x for x in filled if x.dtype == torch.float64]
    single = [x for x in filled if x.dtype != torch.float64]
    norms = list(torch._foreach_norm(double)) if double else []
    norms += torch._foreach_norm(single, 2, torch.float32) if single else []
    return torch.stack([n.double() for n in norms]).square().sum()


# --- values computed from tensors


class TensorCache:
    """A value computed from tensors, valid as long as these are neither replaced nor written to.

    Not a buffer: it is in no state_dict. All ranks write to a parameter or none does, so all agree on what is valid.

    Example:
        cache = TensorCache()
        if not cache.valid(weight):
            cache.keep(expensive(weight), weight)
        use(cache.value)
    """

    def __init__(self) -> None:
        self.value: Any = None
        self._sources: list[tuple[Tensor, tuple[Any, ...]]] | None = None

    def valid(self, *sources: Tensor) -> bool:
        """Return whether the value was computed from these tensors as they are now."""
        if self._sources is None or len(self._sources) != len(sources):
            return False
        return all(state == _state(rows) for (_, state), rows in zip(self._sources, map(local, sources)))

    def keep(self, value: Any, *sources: Tensor) -> None:
        """Store `value`, which was computed from `sources`. They are referenced, so that their memory is not reused."""
        self.value, self._sources = value, [(rows, _state(rows)) for rows in map(local, sources)]


def _state(rows: Tensor) -> tuple[Any, ...]:
    """Return where the values are stored, and the number of writes so far. FSDP shows a parameter as a new object each
    time, but its storage stays; and a rank without a row has a storage too, though no address."""
    return rows.untyped_storage()._cdata, rows.storage_offset(), rows.shape, rows._version
