"""Ranks acting as one: what fails on one of them fails on all, with that rank's reason and without waiting."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from treering.core.errors import CheckpointError


def is_first() -> bool:
    """Whether this process is the one that writes and speaks: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: str, group: Any = None) -> str:
    """Rank 0's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def together(work: Callable[[], Any], doing: str, otherwise: str = "", group: Any = None) -> list[Any]:
    """Do `work` on every rank and return all results; one rank's error of the file system is everybody's."""
    try:
        result, problem = work(), ""
    except OSError as error:
        result, problem = None, f"{error.strerror or error} ({error.filename or doing})"
    except SafetensorError as error:  # a full disk, as safetensors tells it
        result, problem = None, str(error)
    if not dist.is_initialized():
        outcomes = [(result, problem)]
    else:
        outcomes = [(None, "")] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, problem), group=group)
    for rank, (_, text) in enumerate(outcomes):
        if text:
            raise CheckpointError(f"{doing} failed on rank {rank}: {text}{otherwise}")
    return [value for value, _ in outcomes]
