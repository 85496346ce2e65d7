"""Ranks along the mesh's axis `sequence` compute each row of tokens together: whether they have the same rows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from treering.core.errors import DataError, PlanError
from treering.core.row_messages import gather_equal
from treering.core.topology import AXES, axis_size
from treering.objectives import IGNORED

Batch = dict[str, Any]
Fact = tuple[int, int, int]  # micro-batches or −1 for no more data, a digest of them, whether they cannot be used


def agree_along_sequence(step: Sequence[Batch] | None, mesh: DeviceMesh | None, *, refused: bool = False) -> None:
    """Raise DataError on every rank of the mesh unless all ranks along `sequence` have the same step. A collective.

    They compute each row together: with other tokens on one of them the result would be of neither, and with fewer
    micro-batches the others would wait for it without end. Nothing happens where the axis has one rank.

    Args:
        step: This rank's micro-batches as its loader gave them; None: its loader has no more.
        refused: This rank has found them unusable and raises an error of its own after this.
    """
    if mesh is None or axis_size(mesh, "sequence") == 1 or _of_shapes_only(step):
        return
    axis = mesh["sequence"]
    group = axis.get_group()
    # On the host where the group can: the device may still be busy with the step before.
    device = "cpu" if "cpu:gloo" in dist.get_backend_config(group) else mesh.device_type
    own = torch.tensor([-1 if step is None else len(step), _digest(step or ()), refused], device=device)
    gathered = own.new_empty(3 * axis.size())
    gather_equal(gathered, own, group)
    facts: list[Fact] = [tuple(fact) for fact in gathered.view(-1, 3).tolist()]  # type: ignore[misc]
    found = len(set(facts)) > 1 or any(fact[2] for fact in facts)
    anywhere = torch.tensor([found], dtype=torch.uint8, device=device)
    for name in ("replicate", "shard"):
        if axis_size(mesh, name) > 1:
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=mesh[name].get_group())
    if refused or not int(anywhere):
        return
    if not found:
        raise DataError(
            "ranks of another part of the mesh that compute rows together have different or unusable micro-batches; "
            "their messages say which"
        )
    raise DataError(_difference(facts, dist.get_process_group_ranks(group)))


def _difference(facts: Sequence[Fact], ranks: Sequence[int]) -> str:
    unusable = [rank for rank, fact in zip(ranks, facts) if fact[2]]
    if unusable:
        return f"the micro-batches of rank {unusable[0]} cannot be used; its message says why"
    usual = max(facts, key=facts.count)
    others = [f"rank {rank} has {_described(fact)}" for rank, fact in zip(ranks, facts) if fact != usual]
    return (
        f"ranks {', '.join(map(str, ranks))} of the mesh's `sequence` axis compute each row together and need the same "
        f"micro-batches: {', '.join(others)}, and rank {ranks[facts.index(usual)]} {_described(usual)}. Choose "
        "documents by treering.core.topology.data_rank(mesh), not by the rank"
    )


def _described(fact: Fact) -> str:
    if fact[0] < 0:
        return "no more data"
    return f"{fact[0]} micro-batch{'es' * (fact[0] != 1)} with the digest {fact[1] & 0xFFFFFFFF:08x}"


def _of_shapes_only(step: Sequence[Batch] | None) -> bool:
    """Return whether micro-batches have no values, because memory is planned."""
    return step is not None and len(step) > 0 and isinstance(step[0].get("input_ids"), FakeTensor)


def _digest(step: Sequence[Batch]) -> int:
    """Return a number for the tokens, targets, positions and documents of micro-batches."""
    words = xxhash.xxh3_64()
    for batch in step:
        for name in ("input_ids", "targets", "labels", "position_ids", "attention_mask"):
            value = batch.get(name)
            if isinstance(value, Tensor):
                words.update(f"{name} {tuple(value.shape)}".encode())
                words.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        documents = batch.get("documents")
        words.update(repr((batch.get("count"), documents and documents.lengths)).encode())
    return words.intdigest() >> 1  # of an int64


def copies(before: Sequence[Batch], after: Sequence[Batch], mesh: DeviceMesh) -> int:
    """Return on how many ranks each trained token of a step is, or 0 if the step trains none. A collective.

    Ranks along `sequence` are given the same batches. A technique that cuts rows leaves each token on one of them (1);
    if none does, every token is on all of them (the size of this axis).

    Args:
        before: This rank's micro-batches of the step with their `targets`, as its loader gave them.
        after: The same micro-batches after all transforms.
    """
    shared = axis_size(mesh, "sequence")
    if _of_shapes_only(before):
        return shared if after[0]["targets"].numel() == before[0]["targets"].numel() else 1
    given, remaining = (sum(int((batch["targets"] != IGNORED).sum()) for batch in step) for step in (before, after))
    sums = torch.tensor([given, remaining], device=mesh.device_type)
    for axis in AXES:
        dist.all_reduce(sums, group=mesh[axis].get_group())
    given, remaining = sums.tolist()
    given //= shared
    ways = remaining // given if given else 0
    if given and (ways == 0 or ways * given != remaining or shared % ways):
        raise PlanError(
            f"a step has {given} trained tokens, and after the techniques have transformed its batches there are "
            f"{remaining} of them on the ranks together. A technique that cuts rows must leave each token on one rank "
            "of the `sequence` axis, one that does not must leave it on all of them"
        )
    return ways
