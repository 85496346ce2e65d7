"""The memory that a run of any depth, length and number of ranks needs, from traces of a few blocks.

Blocks repeat: from `prefix` on, each is like the one `period` before it. Two depths, two periods apart, are traced, and
every category at every corresponding moment is continued linearly: what is kept grows by the same with every block. The
corresponding moments are those at the first blocks and at the last ones; in between, memory only falls or only grows.
A moment's neighbours matter (FSDP gathers the next block early), so blocks two periods from either end must exist:
three and five blocks of an even model. A model that is no deeper than that is traced as it is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from treering.core.errors import PlanError
from treering.memory import pretend
from treering.memory.depth import RepeatedBlocks, repeats, shorten
from treering.memory.timeline import (
    LONG,
    PHASES,
    SHORT,
    Phase,
    Timeline,
    phase_of,
    traced_row,
    worst_of_phases,
)
from treering.memory.trace import Optimizers, trace
from treering.memory.tracker import CATEGORIES, Category
from treering.objectives import Objective
from treering.plan.compose import draft
from treering.plan.open_model import Dropout
from treering.plan.plan import Plan
from treering.technique import Stage, Technique
from treering.weights.plain_tensors import keep_wide

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig

RESERVED, MESSAGES = 2**30, 2**30  # bytes that are not traced: the driver's context and libraries; NCCL's channels


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The settings of a run on which its memory depends. `mesh` is called inside a process group of all ranks."""

    config: "PretrainedConfig"
    dtype: torch.dtype
    techniques: Sequence[Technique]
    optimizers: Optimizers
    mesh: "Callable[[], DeviceMesh]"
    world: int = 1
    clip: float | None = 1.0
    micro_batches: int = 1
    all_blocks: bool = False  # trace every block, because a technique treats them differently
    seed: int = 0
    dropout: Dropout = "refuse"
    roles: Mapping[str, str] = field(default_factory=dict)
    objective: Objective | None = None


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of one rank at the worst moment of each phase, by category."""

    phases: dict[Phase, dict[Category, float]]
    host: float
    reserved: float

    @property
    def device(self) -> float:
        """Bytes on the device at the worst moment of the step."""
        return self.reserved + max(sum(categories.values()) for categories in self.phases.values())


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The memory of a run of any length, from one or two traces of its step."""

    layout: RepeatedBlocks
    traces: tuple[Timeline, ...]
    reserved: float
    parameters: int  # how many the complete model has
    kinds: Sequence[Any] = ()  # of every block, to recognise the model again

    def at_least(self, length: int) -> float:
        """Return bytes of the device that a step needs at least, where only the smaller depth was traced: its own peak
        at the loss, and what the blocks that are missing keep for their backward: no less than each of the first two
        periods does. (The last one's input may stay where others leave, and the first one's may need no gradient.)"""
        small, period, begin = self.traces[0], self.layout.period, self.layout.prefix
        kept = min(small.kept_of(range(i, i + period), length) for i in (begin, begin + period))
        missing = (self.layout.depth - small.blocks) / period * kept
        peaks = small.peaks(length).sum(1)
        return self.reserved + max(float(peaks.max()), float(peaks[small.blocks + 1]) + missing)

    def at(self, length: int) -> Peak:
        """Return the peak of micro-batches of `length` tokens, which ranks of the axis `sequence` share."""
        *_, large = self.traces
        peaks, host = large.peaks(length), large.host_peak(length)
        phases = [phase_of(segment, large.blocks) for segment in range(len(peaks))]
        if len(self.traces) == 2:
            small = self.traces[0]
            more = (self.layout.depth - large.blocks) / (large.blocks - small.blocks)
            in_large, in_small = self.layout.moments(large.blocks), self.layout.moments(small.blocks)
            phases = [phases[segment] for segment in in_large]
            peaks = peaks[in_large] + more * (peaks[in_large] - small.peaks(length)[in_small])
            host += more * (host - small.host_peak(length))
        worst = worst_of_phases(np.maximum(peaks, 0), phases)
        named = {p: dict(zip(CATEGORIES, map(float, worst[p]))) for p in PHASES}
        return Peak(phases=named, host=host, reserved=self.reserved)

    def longest(self, limit: float, step: int = 256) -> int:
        """Return the most tokens of one document that fit into `limit` bytes, in steps of `step`; 0 if not one does."""
        low, high = 0, 1
        while self.at(high * step).device <= limit:
            low, high = high, high * 2
            if high * step > 1 << 30:
                return low * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle * step).device <= limit else (low, middle)
        return low * step


def forecast(
    subject: Subject,
    length: int,
    *,
    device: torch.device | None = None,
    like: Forecast | None = None,
    most: float | None = None,
) -> Forecast:
    """Return the forecast of `subject`, for any length. The step is traced at about `length` tokens, up to a limit.

    Args:
        like: Of the same model with other techniques. If the blocks that are traced are those that it has, the complete
            model is not drafted again.
        most: With `like`: bytes of the device. Where a few blocks show that more is needed at `length`, the forecast
            is of these few, and raises `TooLarge`.
    """
    if like is not None and len(like.traces) == 2:
        with pretend.ranks(subject.world):
            try:
                found = replace(like, reserved=_reserved(subject, device))

                def check(small: Timeline) -> None:
                    if most is not None and replace(found, traces=(small,)).at_least(length) > most:
                        raise TooLarge

                depths = like.layout.depths()
                return replace(found, traces=_traces(subject, depths, list(like.kinds), length, device, check))
            except _BlocksDiffer:
                pass
    with pretend.ranks(subject.world):
        plan = _draft(subject, None, FakeTensorMode(allow_non_fake_inputs=True), device)
        layout = RepeatedBlocks(depth=len(plan.anatomy.blocks), prefix=0, period=1)
        kinds = [_kind(plan, i) for i in range(layout.depth)]
        layout = repeats(kinds)
        depths = (layout.depth,) if subject.all_blocks else layout.depths()
        try:
            traces = _traces(subject, depths, kinds, length, device)
        except _BlocksDiffer:
            traces = _traces(subject, (layout.depth,), kinds, length, device)
    count = sum(p.numel() for p in plan.model.parameters())
    reserved = _reserved(subject, device)
    return Forecast(layout=layout, traces=traces, reserved=reserved, parameters=count, kinds=kinds)


def refuse_unusable(subject: Subject, like: Forecast) -> None:
    """Raise PlanError where the techniques of `subject` refuse the model or each other. Nothing is traced: a shallow
    model is drafted, and the complete one where that is refused.

    Args:
        like: Of the same model with other techniques.
    """
    depth = like.layout.depths()[0]
    with pretend.ranks(subject.world):
        if depth < like.layout.depth:
            try:
                _draft(subject, depth, FakeTensorMode(allow_non_fake_inputs=True), None)
                return
            except PlanError:  # a setting may name a block that the shallow model does not have
                pass
        _draft(subject, None, FakeTensorMode(allow_non_fake_inputs=True), None)


def _reserved(subject: Subject, device: torch.device | None) -> float:
    return 0 if device is not None else RESERVED + (MESSAGES if subject.world > 1 else 0)


class TooLarge(Exception):
    """A run needs more memory than there is."""


class _BlocksDiffer(Exception):
    """The blocks of a shallower model are not the first ones of the full model."""


def _traces(
    subject: Subject,
    depths: Sequence[int],
    kinds: list[Any],
    length: int,
    device: torch.device | None,
    check: Callable[[Timeline], None] = lambda timeline: None,
) -> tuple[Timeline, ...]:
    """Return the timelines of models of these depths: with the shorter of two rows, unless a tile has all of it.

    Args:
        check: Is given the first.
    """
    traces: list[Timeline] = []
    most = SHORT
    for depth in depths:
        one = _trace(subject, depth, kinds, length, device, most)
        if most < LONG and one.complete_tile and length > most:
            most = LONG
            one = _trace(subject, depth, kinds, length, device, most)
        traces.append(one)
        if len(traces) == 1:
            check(one)
    return tuple(traces)


def _trace(
    subject: Subject, depth: int, kinds: list[Any], length: int, device: torch.device | None, most: int
) -> Timeline:
    """Return the timeline of a step of a model of `depth` blocks with a row of at most `most` tokens."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shallow = depth < len(kinds)
    try:
        plan = _draft(subject, depth if shallow else None, fake, device)
    except PlanError as error:
        if shallow:  # a setting names a block that the shallower model does not have
            raise _BlocksDiffer from error
        raise
    if shallow and [_kind(plan, i) for i in range(depth)] != kinds[:depth]:
        raise _BlocksDiffer
    return trace(
        plan,
        traced_row(length, plan.tokens, most),
        optimizers=subject.optimizers,
        fake=fake,
        device=device or pretend.accelerator(),
        clip=subject.clip,
        micro_batches=subject.micro_batches,
    )


def _draft(subject: Subject, depth: int | None, fake: FakeTensorMode, device: torch.device | None) -> Plan:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(subject.config)
    if depth is not None:
        shorten(config, depth)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=subject.dtype)
    keep_wide(model, subject.dtype)
    with pretend.FakeDevice(fake):
        return draft(
            model,
            [t for t in subject.techniques if t.stage != Stage.COMPILE],  # what a compiler fuses only saves memory
            mesh=subject.mesh(),
            seed=subject.seed,
            dropout=subject.dropout,
            roles=subject.roles,
            objective=subject.objective,
            weights=False,
        )


def _kind(plan: Plan, index: int) -> Any:
    """Return a value that is equal for two blocks if they need the same memory."""
    block: nn.Module = plan.model.get_submodule(plan.anatomy.blocks[index].fqn)
    parameters = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters()]
    return parameters, [(n, type(m).__name__) for n, m in block.named_modules()]
