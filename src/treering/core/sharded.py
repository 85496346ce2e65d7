"""Where a live parameter's values are: whole, or as rows of dimension 0 on each rank."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement


def local(value: Tensor) -> Tensor:
    """What this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def local_rows(value: Tensor) -> tuple[int, int]:
    """The rows of the whole tensor that this rank holds: dealt as torch.chunk does, the last ones short or empty."""
    rows = value.shape[0] if value.ndim else 1
    if not isinstance(value, DTensor):
        return 0, rows
    start, stop = 0, rows
    for axis, placement in enumerate(value.placements):
        if isinstance(placement, Replicate):
            continue
        assert isinstance(placement, ShardPlacement) and placement.dim == 0, f"{placement} of {tuple(value.shape)}"
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
