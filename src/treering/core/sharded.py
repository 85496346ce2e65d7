"""Where a live parameter's values are: whole, or as rows of dimension 0 on each rank."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from treering.core.errors import PlanError


def local(value: Tensor) -> Tensor:
    """What this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def sharded_axes(value: Tensor) -> tuple[int, ...]:
    """The mesh axes over which dimension 0 is cut, in the order in which it is cut; none where it is whole.

    Where experts or tensors are cut over an inner axis before FSDP cuts over an outer one, the outer placement is a
    `_StridedShard`. It is no `Shard`, so code that looks for those would pass over it without an error: rows of such a
    tensor are contiguous, but the outer axis cuts last.
    """
    if not isinstance(value, DTensor):
        return ()
    first: list[int] = []
    last: list[int] = []
    for axis, placement in enumerate(value.placements):
        if isinstance(placement, Replicate):
            continue
        strided = type(placement).__name__ == "_StridedShard"
        if not (strided or isinstance(placement, ShardPlacement)) or getattr(placement, "dim", None) != 0:
            raise PlanError(
                f"a tensor of {tuple(value.shape)} is placed as {placement} on axis {axis} of its mesh; only tensors "
                "whose dimension 0 is sharded can be trained, saved and clipped"
            )
        (last if strided else first).append(axis)
    return (*first, *last)


@torch.no_grad()
def sum_over_rows(value: Tensor, like: Tensor) -> Tensor:
    """In place: the sum over the ranks that hold other rows of `like`. Replicas have it already. A collective."""
    for axis in sharded_axes(like):
        dist.all_reduce(value, group=like.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return value


def local_rows(value: Tensor) -> tuple[int, int]:
    """The rows of the whole tensor that this rank holds: dealt as torch.chunk does, the last ones short or empty."""
    rows = value.shape[0] if value.ndim else 1
    if not isinstance(value, DTensor):
        return 0, rows
    start, stop = 0, rows
    for axis in sharded_axes(value):
        each = -(-(stop - start) // value.device_mesh.size(axis))
        begin = min(start + value.device_mesh.get_local_rank(axis) * each, stop)
        start, stop = begin, min(begin + each, stop)
    return start, stop


def settle(model: nn.Module) -> None:
    """Let go of gathered parameters. After a forward without a backward (evaluation, generation) FSDP may still show
    whole ones, in memory that the next collective frees, where everybody looks for the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's rows of `whole` into `target`, casting to its dtype."""
    start, stop = local_rows(target)
    put_rows(target, whole[start:stop] if target.ndim else whole)


@torch.no_grad()
def put_rows(target: Tensor, rows: Tensor) -> None:
    held = local(target)
    assert held.shape == rows.shape, f"{tuple(rows.shape)} into {tuple(held.shape)}"
    held.copy_(rows)


@torch.no_grad()
def gather(value: Tensor) -> Tensor:
    """The whole tensor, on every rank. A collective when it is sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
