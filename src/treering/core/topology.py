"""One DeviceMesh from a few numbers, and the sizes and submeshes that other packages need.

Three axes, always all of them, outermost first:

    replicate   copies of the sharded model (hybrid sharding)      } different documents
    shard       parameters are sharded over it                     }
    sequence    one document is spread over it; parameters are sharded over it too

`expert` is no fourth axis: it divides shard × sequence. A mesh with experts has a second view of the same ranks, with
the axes replicate × efsdp × expert: each rank keeps its documents, and has the experts of its place along `expert`.

    ranks of one copy      0    1    2    3        shard=4, expert=2
    efsdp, expert         0,0  0,1  1,0  1,1       ranks 0 and 2 have the same experts, sharded over both
"""

import copy
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from treering.core.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("replicate", "shard", "sequence")
EXPERT_AXES = ("replicate", "efsdp", "expert")  # of the second view
FLAT = "parameters"  # the name of shard × sequence where both are one dimension
_VIEW = "_treering_experts"  # the attribute of a mesh that holds its second view
_GRIDS = "_treering_grids"  # the attribute of a mesh that holds its axis `sequence` as grids
STARTUP = timedelta(minutes=30)  # how long a rank waits for another one that loads or compiles; training then lowers it


def sizes(world: int, *, replicate: int = 1, shard: int = -1, sequence: int = 1, expert: int = 1) -> tuple[int, ...]:
    """Return the sizes of replicate, shard and sequence for `world` ranks, and of expert.

    One of the first three may be `-1`, for the rest. `expert` divides shard × sequence, and `-1` is all of it.
    """
    given = dict(zip(AXES, (replicate, shard, sequence)))
    written = ", ".join(f"{name}={size}" for name, size in given.items())
    for name, size in (*given.items(), ("expert", expert)):
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
    sharing = given["shard"] * given["sequence"]
    expert = sharing if expert == -1 else expert
    if sharing % expert:
        raise PlanError(
            f"mesh: expert={expert} does not divide the {sharing} ranks of shard × sequence, over which experts are "
            f"assigned; write a divisor of {sharing}",
            settings=("mesh.expert",),
        )
    return (*given.values(), expert)


def mesh(
    *, replicate: int = 1, shard: int = -1, sequence: int = 1, expert: int = 1, device: str | None = None
) -> "DeviceMesh":
    """Return the mesh of all ranks. Without a launcher, create a process group of one rank.

    Args:
        replicate: copies of the parameters, each on `shard` × `sequence` ranks.
        shard: ranks that share one copy and have documents of their own; −1: all ranks that are left.
        sequence: ranks that share one copy and one document.
        expert: ranks over which the experts of a mixture are assigned, each to one of them; it divides
            `shard` × `sequence`, and each rank keeps its own documents. −1: all of these ranks.
        device: `cuda` or `cpu`; default: `cuda` where there is one.

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.Shard()], mesh=tr.mesh(replicate=2, shard=-1))
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = join(kind)
    *shape, experts = sizes(world, replicate=replicate, shard=shard, sequence=sequence, expert=expert)
    ranks = init_device_mesh(kind, tuple(shape), mesh_dim_names=AXES)
    if experts > 1:
        view = (shape[0], shape[1] * shape[2] // experts, experts)
        setattr(ranks, _VIEW, init_device_mesh(kind, view, mesh_dim_names=EXPERT_AXES))
    return ranks


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
    """Return the product of the sizes of `axes`, of one of the two views of a mesh; 1 without a mesh."""
    product = 1
    for name in axes if mesh is not None else ():
        if name != "expert":
            product *= mesh[name].size()  # type: ignore[index]
        elif (view := expert_mesh(mesh)) is not None:  # type: ignore[arg-type]
            product *= view["expert"].size()
    return product


def expert_mesh(mesh: "DeviceMesh") -> "DeviceMesh | None":
    """Return the second view of the ranks, replicate × efsdp × expert; None where experts are not assigned to ranks."""
    return getattr(mesh, _VIEW, None)


def without_expert_axis(mesh: "DeviceMesh") -> "DeviceMesh":
    """Return the same ranks and axes without the second view: for a model whose experts are not assigned to ranks."""
    plain = copy.copy(mesh)
    if hasattr(plain, _VIEW):
        delattr(plain, _VIEW)
    return plain


def unit_mesh(view: "DeviceMesh") -> "DeviceMesh":
    """Return the mesh for `fully_shard` of experts: `efsdp`, after `replicate` if it is > 1."""
    return view["replicate", "efsdp"] if view["replicate"].size() > 1 else view["efsdp"]


def grid_of_sequence(mesh: "DeviceMesh", columns: int) -> tuple[Any, Any]:
    """Return the process groups of this rank's row and column where the axis `sequence` is a grid, row by row, with so
    many columns. Every rank calls it; a grid is made once for a mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    grids = vars(mesh).setdefault(_GRIDS, {})
    if columns not in grids:
        replicate, shard, sequence = (axis_size(mesh, name) for name in AXES)
        shape = (replicate, shard, sequence // columns, columns)
        grids[columns] = init_device_mesh(
            mesh.device_type, shape, mesh_dim_names=("replicate", "shard", "row", "column")
        )
    grid = grids[columns]
    # The ranks of a row differ in their column: they are the axis `column`.
    return grid["column"].get_group(), grid["row"].get_group()


def data_rank(mesh: "DeviceMesh | None") -> tuple[int, int]:
    """Return (number, of how many) of the set of documents of this rank, shared along `sequence`."""
    if mesh is None:
        return 0, 1
    replicate, shard = mesh["replicate"], mesh["shard"]
    return replicate.get_local_rank() * shard.size() + shard.get_local_rank(), replicate.size() * shard.size()


def sequence_place(mesh: "DeviceMesh | None") -> tuple[int, ...]:
    """Return the number of this rank along `sequence`; nothing where no other rank shares its rows."""
    return (mesh["sequence"].get_local_rank(),) if mesh is not None and axis_size(mesh, "sequence") > 1 else ()


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
    """Return the names of the axes that dimension `axis` of a mesh of `parameter_mesh` or `unit_mesh` combines."""
    assert mesh.mesh_dim_names is not None
    name = mesh.mesh_dim_names[axis]
    return ("shard", "sequence") if name == FLAT else (name,)
