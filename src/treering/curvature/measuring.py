"""A complete measurement: every batch through the model, as often as memory requires, one tensor written at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treering.core.errors import DataError, PlanError
from treering.curvature.adding import added, joint, refuse_other
from treering.curvature.disk import open_folder, writing
from treering.curvature.entry import Counts, Entry
from treering.curvature.exact_sums import ExactSum, Steps
from treering.curvature.factors import GradientSettings
from treering.curvature.fingerprint import fingerprints
from treering.curvature.measured_model import (
    Batch,
    Composed,
    MaskedBatches,
    MeasuredModel,
    agreed,
    evaluating,
    real_tokens,
)
from treering.curvature.measuring_gradients import measure_gradients
from treering.curvature.observe import Observer, observe
from treering.curvature.passes import bits_of_batches, passes_within, share_peaks
from treering.curvature.statistics import Ring, Statistics, in_memory, sizes
from treering.curvature.sums import reduced

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy

MEMORY_LIMIT = 8 << 30  # bytes of sums at a time


def measure(
    model: "nn.Module | Composed",
    batches: Iterable[Batch],
    *,
    anatomy: "Anatomy | None" = None,
    mesh: "DeviceMesh | None" = None,
    tokens: Literal["real", "trained"] = "real",
    ring: Ring | None = None,
    onto: Sequence[Statistics] = (),
    to: str | Path | None = None,
    memory_limit: int | None = None,
    gradients: GradientSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Statistics:
    """Measure the second moments of the inputs of all linear layers and experts in the blocks of `model`; with
    `gradients` also those of their output gradients.

    Args:
        model: a live transformers model, sharded or not, or a composed run.
        batches: `input_ids` [B, S], and, if B > 1, which tokens are not padding: `real` or `attention_mask`, both
            [B, S], or `documents` of a packed row. Of several ranks each has its own, and all have equally many; ranks
            along a mesh's `sequence` are given the same.
        anatomy: of the plain model, where techniques have changed it already; a run knows it.
        mesh: from treering.mesh(…); default: the run's, else all ranks have batches of their own.
        tokens: `trained`: only those from which a trained token is predicted.
        ring: name, data and date of this measurement; its tokens are counted here.
        onto: earlier statistics that this measurement is added to.
        to: a folder to write, instead of keeping everything in memory.
        memory_limit: bytes of sums at a time: where all do not fit, the batches go through the model several times.
            Default: 8 GiB, or half of what the device has free.
        gradients: what to measure of gradients, by a backward of each batch. Tokens after the last label of their
            document have none, and do not count then. Batches without labels train every next token.
        progress: called with (batches done, batches in all passes).

    Returns:
        The statistics, the same on every rank.

    Example:
        known = tr.measure(model, [{"input_ids": ids}])
        run = tr.compose("MODEL", [tr.OSFT()], statistics=known, prepared="prepared")
    """
    subject = MeasuredModel.of(model, anatomy, mesh)
    every = list(batches)
    if not every:
        raise DataError("there is no batch to measure; every rank needs at least one")
    masked_batches = [(batch, real_tokens(batch, tokens)) for batch in every]
    _refuse_nothing(subject, masked_batches, tokens)
    limit = memory_limit or _memory_limit(subject.device)
    ring = ring or Ring(name="", tokens=0)
    if gradients is not None:
        if onto:
            raise PlanError("statistics that are added up have inputs only; measure gradients without `onto`")
        folder = None if to is None else Path(to)
        return measure_gradients(subject, masked_batches, gradients, ring, folder, limit, progress)
    with evaluating(subject.model):
        grid = _grid(subject, masked_batches)
        passes = _passes(subject, grid.owners, limit)
        return _measured(subject, masked_batches, grid, passes, ring, onto, to, progress)


def _refuse_nothing(subject: MeasuredModel, masked_batches: MaskedBatches, tokens: Literal["real", "trained"]) -> None:
    """Raise a DataError if no token of any rank counts. One rank alone may have nothing but padding."""
    if int(reduced(torch.tensor(_count(masked_batches), device=subject.device), subject.groups)) == 0:
        what = "predicts a trained token (are all labels -100?)" if tokens == "trained" else "is not padding"
        raise DataError(
            f"no token of the batches {what}, so there is nothing to measure; look at their attention_mask, `real` or "
            "labels, or give other text"
        )


def _count(masked_batches: MaskedBatches) -> int:
    """Return the number of tokens of this rank's batches that are to be counted."""
    return sum(batch["input_ids"].numel() if real is None else int((real != 0).sum()) for batch, real in masked_batches)


@dataclass(frozen=True, kw_only=True)
class IntegerGrid:
    """The integers to which products are rounded, the same on all ranks.

    Attributes:
        owners: weight → the one whose sum is also its sum, as the first batch showed.
        steps: of each sum, by owner.
        bits: of the steps.
    """

    owners: dict[str, str]
    steps: dict[str, Steps]
    bits: int

    def new_sum(self, weight: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ExactSum:
        unknown = torch.zeros(shape[-1], dtype=torch.int64)
        steps = self.steps.get(weight, Steps(rows=unknown, columns=unknown, bits=self.bits))
        return ExactSum.empty(shape, device, steps)


def _grid(subject: MeasuredModel, masked_batches: MaskedBatches) -> IntegerGrid:
    """Return the grid, from one forward of the first batch of each rank, of which that of rank 0 counts."""

    def peaks(weight: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ExactSum:
        return ExactSum.empty(shape, device, None)

    with observe(subject.model, subject.anatomy, new_sum=peaks) as seen:
        subject.forward(seen, *masked_batches[0])
    owners = seen.order()
    agreed(owners)
    shapes = {owner: sizes(subject.anatomy)[owner] for owner in dict.fromkeys(owners.values())}
    sums = {o: seen.sums.get(o) or ExactSum.empty(shape, subject.device, None) for o, shape in shapes.items()}
    share_peaks(sums.values())
    bits = bits_of_batches(subject, masked_batches)
    return IntegerGrid(owners=owners, steps={o: one.chosen(bits) for o, one in sums.items()}, bits=bits)


def _passes(subject: MeasuredModel, owners: dict[str, str], limit: int) -> list[set[str]]:
    """Return the weights of each pass through the batches."""
    every = {weight: prod(shape) for weight, shape in sizes(subject.anatomy).items()}
    if len(passes_within(limit, every)) <= 1:
        return [set(every)]
    chosen = passes_within(limit, {owner: every[owner] for owner in owners.values()})
    return [{weight for weight, owner in owners.items() if owner in names} for names in chosen]


def _memory_limit(device: torch.device) -> int:
    """Return the default limit, the same on every rank: all need the same number of passes."""
    limit = MEMORY_LIMIT
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = min(limit, (torch.cuda.mem_get_info(device)[0] + unused) // 2)
    if dist.is_initialized() and dist.get_world_size() > 1:
        least = torch.tensor(limit, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        limit = int(least)
    return limit


def _measured(
    subject: MeasuredModel,
    masked_batches: MaskedBatches,
    grid: IntegerGrid,
    passes: Sequence[set[str]],
    ring: Ring,
    onto: Sequence[Statistics],
    to: str | Path | None,
    progress: Callable[[int, int], None],
) -> Statistics:
    for one in onto:
        one.check(subject.anatomy)
    watched = _watched(subject, masked_batches, grid, passes, progress)
    first = next(watched)
    owners = first.order() if len(passes) == 1 else grid.owners
    rings = [*(r for one in onto for r in one.rings), replace(ring, tokens=first.counted(subject.groups))]
    for one in onto:
        if set(one.entries) != set(owners):
            refuse_other(one, _described(subject, owners))
    keys = joint(owners, *({w: e.key for w, e in one.entries.items()} for one in onto))
    means = (mean for seen in chain([first], watched) for mean in seen.means(subject.groups))
    measured_weights = fingerprints(subject.model, owners)
    if to is None:
        tensors: dict[str, Tensor] = {}
        counts: dict[str, Counts] = {}
        for owner, mean, count in means:
            for key in _keys_of(owner, owners, keys):
                tensors[key], counts[key] = added(key, onto, mean.clone() if onto else mean, count)
        return in_memory(subject.anatomy.model_type, tensors, keys, counts, tuple(rings), measured_weights)
    shapes = {key: sizes(subject.anatomy)[key] for key in dict.fromkeys(keys.values())}
    with writing(Path(to), shapes, subject.anatomy.model_type, keys, rings) as writer:
        writer.fingerprints = measured_weights
        for owner, mean, count in means:
            for key in _keys_of(owner, owners, keys):
                writer.add(key, partial(added, key, onto, mean.clone() if onto else mean, count))
    return open_folder(to)


def _watched(
    subject: MeasuredModel,
    masked_batches: MaskedBatches,
    grid: IntegerGrid,
    passes: Sequence[set[str]],
    progress: Callable[[int, int], None],
) -> Iterator[Observer]:
    """Yield the observer of each pass, with its sums complete."""
    for number, weights in enumerate(passes):
        done = number * len(masked_batches)
        while True:  # a second time, where a batch does not fit the grid of the first one
            with observe(subject.model, subject.anatomy, weights=weights, new_sum=grid.new_sum) as seen:
                for i, (batch, real) in enumerate(masked_batches):
                    subject.forward(seen, batch, real)
                    progress(done + i + 1, len(passes) * len(masked_batches))
            agreed(seen.order())
            if number == 0:
                subject.agree(_count(masked_batches), seen.tokens)
            larger = _larger_steps(seen, subject)
            if not larger:
                break
            grid = replace(grid, steps=grid.steps | larger)
        yield seen


def _larger_steps(seen: Observer, subject: MeasuredModel) -> dict[str, Steps]:
    """Return the steps of sums that may have overflowed, by owner. A collective."""
    found = {}
    for owner in dict.fromkeys(seen.order().values()):
        if owner not in seen.sums:  # no token on this rank; others may have some
            seen.sums[owner] = seen.new_sum(owner, seen.sizes[owner], *seen.kinds[owner])
        if (steps := seen.sums[owner].larger_steps(owner, subject.groups)) is not None:
            found[owner] = steps
    return found


def _keys_of(owner: str, owners: Mapping[str, str], keys: Mapping[str, str]) -> list[str]:
    """Return the tensors that get one measured moment: one, unless earlier rings store apart what is shared now."""
    return [key for key in dict.fromkeys(keys.values()) if owners[key] == owner]


def _described(subject: MeasuredModel, owners: Mapping[str, str]) -> Statistics:
    """Return statistics without values that describe what would be measured, for a message."""
    shapes = sizes(subject.anatomy)
    entries = {w: Entry(key=w, tokens=0, shape=shapes[w], digest="") for w in owners}
    return Statistics(
        model_type=subject.anatomy.model_type,
        entries=entries,
        rings=(),
        read=lambda entry: Tensor(),
        where="this model",
    )
