"""Values and errors of all ranks: what fails on one rank fails on all, with that rank's reason and without waiting."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from treering.core.errors import CheckpointError, TreeringError


def is_first() -> bool:
    """Return whether this process is the one that writes files and messages: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: str, group: Any = None) -> str:
    """Return rank 0's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return the values of all ranks, by rank. A collective over `group`, which contains this rank; default: all."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def together(work: Callable[[], Any], doing: str, otherwise: str = "", group: Any = None) -> list[Any]:
    """Call `work` on every rank and return all results; an error of one rank is raised on all: one of the file system,
    or a user error, which that rank raises itself."""
    own: TreeringError | None = None
    try:
        result, problem = work(), ""
    except OSError as error:
        result, problem = None, f"{error.strerror or error} ({error.filename or doing})"
    except SafetensorError as error:  # safetensors reports a full disk by this
        result, problem = None, str(error)
    except TreeringError as error:
        own, result, problem = error, None, str(error)
    outcomes = gather_objects((result, problem), group)
    if own is not None:
        raise own
    for rank, (_, text) in enumerate(outcomes):
        if text:
            raise CheckpointError(f"{doing} failed on rank {rank}: {text}{otherwise}")
    return [value for value, _ in outcomes]
