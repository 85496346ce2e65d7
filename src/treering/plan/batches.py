"""From a loader's micro-batches to optimizer steps: counted over all ranks, padded to the same number, transformed."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from treering.attention import Documents
from treering.core.errors import DataError, PlanError
from treering.core.topology import AXES, axis_size
from treering.objectives import IGNORED
from treering.plan.loss import trained_tokens

Batch = dict[str, Any]


def steps(loader: Iterable[Batch | list[Batch]], accumulate: int, mesh: DeviceMesh | None) -> Iterator[list[Batch]]:
    """Yield lists of micro-batches, one per optimizer step, as many on every rank, with the count of all ranks.

    A loader may yield micro-batches (then `accumulate` of them make a step, the last step takes what is left) or
    lists of them. Batches that have a `count` already are passed on without communication. A rank whose loader
    has fewer than others' takes part with micro-batches that train nothing.
    """
    alone = axis_size(mesh, "replicate", "shard") == 1
    gathered = _gathered(loader, accumulate)
    while True:
        step = next(gathered, None)
        if step is not None and step and all("count" in batch for batch in step):
            yield step
            continue
        if alone:
            if step is None:
                return
            most = len(step)
            count = _trained(step)
        else:
            assert mesh is not None
            count, most = _agree(0 if step is None else _trained(step), 0 if step is None else len(step), mesh)
            if most == 0 and step is None:
                return
        if count == 0:
            raise DataError("a step has no trained token on any rank: every label is -100, or there is no batch in it")
        batches = [*(step or []), *[silent()] * (most - len(step or []))]
        yield [{**batch, "count": count} for batch in batches]


def _gathered(loader: Iterable[Batch | list[Batch]], accumulate: int) -> Iterator[list[Batch]]:
    waiting: list[Batch] = []
    for item in loader:
        if isinstance(item, list):
            yield item
            continue
        waiting.append(item)
        if len(waiting) == accumulate:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _trained(step: list[Batch]) -> int:
    for batch in step:
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise DataError(f"a micro-batch has no {' and no '.join(missing)}; it has {', '.join(batch) or 'nothing'}")
        _refuse_across(batch)
    return sum(trained_tokens(batch["labels"]) for batch in step)


def _refuse_across(batch: Batch) -> None:
    """Raise DataError for a label at the first token of a packed document: the document before would predict it."""
    documents = batch.get("documents")
    if documents is None:
        return
    documents.check(batch["labels"].shape[1])
    starts = documents.cu_seqlens[:-1].to(batch["labels"].device, torch.long)
    wrong = (batch["labels"][0, starts] != IGNORED).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(documents.lengths)} packed documents (the {wrong[0] + 1}. first) have a label at "
            f"their first token, which would be predicted from the document before; set it to {IGNORED}"
        )


def _agree(count: int, most: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Return the number of trained tokens over all ranks, and of micro-batches on the rank that has most."""
    total = torch.tensor([count], device=mesh.device_type)
    longest = torch.tensor([most], device=mesh.device_type)
    for axis in ("replicate", "shard"):
        dist.all_reduce(total, group=mesh[axis].get_group())
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=mesh[axis].get_group())
    return int(total), int(longest)


def copies(before: Sequence[Batch], after: Sequence[Batch], mesh: DeviceMesh) -> int:
    """Return how many ranks hold each trained token of a step, or 0 if the step trains none. A collective.

    Ranks along `sequence` and `expert` are given the same batches. A technique that cuts rows leaves each token on one
    of them (1); if none does, every token is on all of them (the size of these axes).

    Args:
        before: This rank's micro-batches of the step with their `targets`, as its loader gave them.
        after: The same micro-batches after all transforms.
    """
    shared = axis_size(mesh, "sequence", "expert")
    given, left = (sum(int((batch["targets"] != IGNORED).sum()) for batch in step) for step in (before, after))
    extremes = torch.tensor([given, -given], device=mesh.device_type)
    for axis in ("sequence", "expert"):
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh[axis].get_group())
    differs = int(extremes.sum())
    sums = torch.tensor([given, left, differs], device=mesh.device_type)
    for axis in AXES:
        dist.all_reduce(sums, group=mesh[axis].get_group())
    given, left, differs = sums.tolist()
    if differs:
        raise DataError(
            "ranks along the mesh's `sequence` (and `expert`) axis were given batches with different numbers of "
            "trained tokens; they compute one row together and need the same batches: choose documents by "
            "treering.core.topology.data_rank(mesh), not by the rank"
        )
    given //= shared
    ways = left // given if given else 0
    if given and (ways == 0 or ways * given != left or shared % ways):
        raise PlanError(
            f"a step has {given} trained tokens, and after the techniques have transformed its batches there are "
            f"{left} of them on the ranks together. A technique that cuts rows must leave each token on one rank of "
            "the `sequence` axis, one that does not must leave it on all of them"
        )
    return ways


def silent() -> Batch:
    """Return a micro-batch of two tokens that trains nothing, for a rank that others wait for in gathers and sums."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": ids, "labels": torch.full_like(ids, IGNORED), "samples": []}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor | Documents) else value for name, value in batch.items()}
