"""The micro-batches of an optimizer step, counted over all ranks, and the plain loss of one.

A loader's micro-batches become steps: as many on every rank, with the number of trained tokens on all of them.
`Run.loss` divides the sum over trained positions by that number.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from treering.attention import Documents
from treering.core.errors import DataError, PlanError
from treering.core.topology import axis_size
from treering.objectives import IGNORED, CrossEntropy, Objective
from treering.objectives.plain_loss import plain_loss
from treering.objectives.trained import sent_to, with_trained
from treering.plan.sequence import agree_along_sequence
from treering.technique import Applied

Batch = dict[str, Any]


def steps(loader: Iterable[Batch | list[Batch]], accumulate: int, mesh: DeviceMesh | None) -> Iterator[list[Batch]]:
    """Yield lists of micro-batches, one per optimizer step, as many on every rank, with the count of all ranks.

    A loader may yield micro-batches (then `accumulate` of them are a step, and the last step has the remaining ones)
    or lists of them. Batches that have a `count` already are passed on without communication. A rank whose loader
    has fewer than others' takes part with micro-batches that train nothing.
    """
    alone = axis_size(mesh, "replicate", "shard") == 1
    gathered = _gathered(loader, accumulate)
    while True:
        step = next(gathered, None)
        counted = bool(step) and all("count" in batch for batch in step or ())
        problem, count = (None, 0) if counted else _examined(step or ())
        agree_along_sequence(step, mesh, refused=problem is not None)
        if problem is not None and axis_size(mesh, "sequence") > 1:
            raise problem  # all others have raised an error, too
        if counted and step is not None:
            yield step
            continue
        most = len(step or ())
        if not alone:
            assert mesh is not None
            count, most, problem = _agree(count, most, problem, mesh)
        if problem is not None:
            raise problem
        if step is None and most == 0:
            return
        if count == 0:
            raise DataError("a step has no trained token on any rank: every label is -100, or there is no batch in it")
        batches = [*(step or []), *[silent()] * (most - len(step or []))]
        yield [{**batch, "count": count} for batch in batches]


def _examined(step: Sequence[Batch]) -> tuple[DataError | None, int]:
    """Return why a step cannot be used, if it cannot, and how many tokens it trains."""
    try:
        return None, _trained(step)
    except DataError as error:
        return error, 0


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


def _trained(step: Sequence[Batch]) -> int:
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


def _agree(count: int, most: int, problem: DataError | None, mesh: DeviceMesh) -> tuple[int, int, DataError | None]:
    """Return the number of trained tokens over all ranks, of micro-batches on the rank that has most, and an error
    where a rank has one."""
    total = torch.tensor([count], device=mesh.device_type)
    largest = torch.tensor([most, problem is not None], device=mesh.device_type)
    for axis in ("replicate", "shard"):
        dist.all_reduce(total, group=mesh[axis].get_group())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh[axis].get_group())
    longest, failed = largest.tolist()
    if failed and problem is None:
        problem = DataError("the micro-batches of another rank cannot be used; its message says why")
    return int(total), int(longest), problem


def silent() -> Batch:
    """Return a micro-batch of two tokens that trains nothing, for a rank that others wait for in gathers and sums."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": ids, "labels": torch.full_like(ids, IGNORED), "samples": []}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`, and with its trained positions, found where its targets are."""

    def sent(value: Any) -> Any:
        return sent_to(value, device) if isinstance(value, Tensor) else value.to(device)

    there = {name: sent(value) if isinstance(value, Tensor | Documents) else value for name, value in batch.items()}
    return with_trained(batch, there)


def trained_tokens(labels: Tensor) -> int:
    """Return how many labels are trained. The first of a row never is: nothing precedes it."""
    return int((labels[:, 1:] != IGNORED).sum())


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with `targets`: what each position predicts, the label of the next one; -100 at a row's end.

    Labels are shifted here and nowhere else, once a micro-batch, so that techniques may cut rows and lose no target.
    """
    if "targets" in batch or "labels" not in batch:  # text that is only measured has no labels
        return batch
    return {**batch, "targets": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}


def choose_objective(given: Objective | None, applied: Sequence[Applied]) -> Objective:
    """Return the objective of a run: the one given, or the one that a technique's settings ask for, or cross-entropy.

    Args:
        given: The argument of `compose`.
        applied: The results of the run's techniques.
    """
    asked = [one.objective for one in applied if one.objective is not None]
    if given is not None and asked:
        raise PlanError(
            f"the objective is {given!r}, and the settings of a technique ask for {asked[0]!r}. Leave "
            "label_smoothing and z_loss out of tiledloss; CrossEntropy(label_smoothing=…, z_loss=…) has them, and "
            "Distill has neither"
        )
    return given or (asked[0] if asked else CrossEntropy())


def cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return Σ −log p(token | those before it) over trained tokens."""
    return plain_loss(model, batch, CrossEntropy())
