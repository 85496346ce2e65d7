"""One DeviceMesh from a few numbers, and the sizes and submeshes that other packages need.

Four axes, always all of them, outermost first:

    replicate   copies of the sharded model (hybrid sharding)      } different documents
    shard       parameters are sharded over it                     }
    sequence    one document is spread over it; parameters are sharded over it too
    expert      experts are sharded over it
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from treering.core.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("replicate", "shard", "sequence", "expert")
FLAT = "parameters"  # the name of shard × sequence where both are one dimension
STARTUP = timedelta(minutes=30)  # how long a rank waits for another one that loads or compiles; training then lowers it


def sizes(world: int, *, replicate: int = 1, shard: int = -1, sequence: int = 1, expert: int = 1) -> tuple[int, ...]:
    """Return the size of each axis for `world` ranks; one `-1` means "the rest"."""
    given = dict(zip(AXES, (replicate, shard, sequence, expert)))
    written = ", ".join(f"{name}={size}" for name, size in given.items())
    for name, size in given.items():
        if size != -1 and size < 1:
            raise PlanError(f"mesh: {name}={size}; a size is at least 1, or -1 for the rest")
    rest = [name for name, size in given.items() if size == -1]
    if len(rest) > 1:
        raise PlanError(f"mesh: {' and '.join(rest)} are both -1; only one axis can take the rest")
    known = 1
    for size in given.values():
        known *= 1 if size == -1 else size
    if rest:
        if world % known:
            raise PlanError(
                f"mesh({written}): the given sizes multiply to {known}, which does not divide {world} ranks"
            )
        given[rest[0]] = world // known
    elif known != world:
        raise PlanError(
            f"mesh({written}) has {known} places for {world} ranks; "
            f"start {known} ranks, or write -1 for one axis to take the rest"
        )
    return tuple(given.values())


def mesh(
    *, replicate: int = 1, shard: int = -1, sequence: int = 1, expert: int = 1, device: str | None = None
) -> "DeviceMesh":
    """Return the mesh of all ranks. Without a launcher, create a process group of one rank.

    Args:
        replicate: copies of the parameters, each on `shard` × `sequence` ranks.
        shard: ranks that share one copy and have documents of their own; −1: all ranks that are left.
        sequence: ranks that share one copy and one document.
        expert: ranks that share the experts of one copy.
        device: `cuda` or `cpu`; default: `cuda` where there is one.

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.Shard()], mesh=tr.mesh(replicate=2, shard=-1))
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = join(kind)
    shape = sizes(world, replicate=replicate, shard=shard, sequence=sequence, expert=expert)
    return init_device_mesh(kind, shape, mesh_dim_names=AXES)


def join(kind: str) -> int:
    """Join a process group and return its size: the running one, the launcher's, or a new one of this process alone."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=STARTUP)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_world_size()


def axis_size(mesh: "DeviceMesh | None", *axes: str) -> int:
    """Return the product of the sizes of `axes`; 1 without a mesh."""
    product = 1
    for name in axes if mesh is not None else ():
        product *= mesh[name].size()  # type: ignore[index]
    return product


def data_rank(mesh: "DeviceMesh | None") -> tuple[int, int]:
    """Return (number, of how many) of the set of documents of this rank, shared along `sequence` and `expert`."""
    if mesh is None:
        return 0, 1
    replicate, shard = mesh["replicate"], mesh["shard"]
    return replicate.get_local_rank() * shard.size() + shard.get_local_rank(), replicate.size() * shard.size()


def parameter_mesh(mesh: "DeviceMesh") -> "DeviceMesh":
    """Return the mesh for `fully_shard`: one axis to shard over (shard × sequence), after `replicate` if it is > 1."""
    sharded = ("shard", "sequence") if axis_size(mesh, "sequence") > 1 else ("shard",)
    if len(sharded) == 1:
        return mesh["replicate", "shard"] if axis_size(mesh, "replicate") > 1 else mesh["shard"]
    flat = mesh[sharded]._flatten(FLAT)
    if axis_size(mesh, "replicate") > 1:
        return mesh["replicate", FLAT]
    return flat


def axes_of(mesh: "DeviceMesh", axis: int) -> tuple[str, ...]:
    """Return the names, as in AXES, of the axes that dimension `axis` of a mesh of `parameter_mesh` combines."""
    assert mesh.mesh_dim_names is not None
    name = mesh.mesh_dim_names[axis]
    return ("shard", "sequence") if name == FLAT else (name,)
