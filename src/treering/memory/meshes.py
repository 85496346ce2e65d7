"""Which mesh of so many ranks takes a step in the least time, and fits.

The messages of one small mesh, drafted once, are those of every other one up to numbers of ranks: a rank gives its rows
to a gather, so that bytes times ranks stay; it gives complete tensors to a sum over shards, and its rows to one over
replicas. What ranks along `sequence` send depends on no other axis, and the technique that shares rows counts it for
any number of them.

The memory of a rank depends on two numbers only, the ranks that share a row and the ranks that share weights:
activations are at least divided by the first, and weights, gradients and the optimizer's state by the second. So one
trace shows which other meshes cannot fit, and only those are traced that can, the fastest first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from treering.core.errors import PlanError
from treering.core.links import Links
from treering.memory.forecast import Peak
from treering.memory.tracker import CATEGORIES, Category
from treering.memory.traffic import StepTime, counted, step_time, timed
from treering.plan.plan import Plan
from treering.technique import Message, Workload

KEPT = ("parameters", "technique", "optimizer", "gradients", "gathered")  # whatever the length of a row
MOST_TRACES = 5  # each takes a second or two


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """The sizes of a mesh."""

    replicate: int
    shard: int
    sequence: int
    expert: int = 1

    @property
    def sharing(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.shard * self.sequence

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis of both views."""
        axes = {"replicate": self.replicate, "shard": self.shard, "sequence": self.sequence}
        return axes | {"expert": self.expert, "efsdp": self.sharing // self.expert}

    def __str__(self) -> str:
        expert = f", expert: {self.expert}" if self.expert > 1 else ""
        return f"{{replicate: {self.replicate}, shard: {self.shard}, sequence: {self.sequence}{expert}}}"


def probe_shape(expert: int, *, shared: bool) -> MeshShape:
    """Return the mesh whose messages are read: every axis that a run can have is longer than 1."""
    return MeshShape(replicate=2, shard=2 * expert, sequence=2 if shared else 1, expert=expert)


def shapes(ranks: int, expert: int, *, shared: bool) -> Iterator[MeshShape]:
    """Yield every mesh of `ranks`; with sequence 1 only, unless rows can be shared."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for sequence in divisors if shared else [1]:
        for shard in (n for n in divisors if ranks // sequence % n == 0):
            if shard * sequence % expert == 0:
                yield MeshShape(replicate=ranks // sequence // shard, shard=shard, sequence=sequence, expert=expert)


def resized(messages: Sequence[tuple[str, Message]], probe: MeshShape, shape: MeshShape) -> list[tuple[str, Message]]:
    """Return the messages of a plan drafted on the mesh `probe`, as they are on `shape`."""
    found = ((name, _resized(one, probe.sizes, shape.sizes)) for name, one in messages)
    return [(name, one) for name, one in found if one.ranks > 1]


def _resized(one: Message, before: Mapping[str, int], after: Mapping[str, int]) -> Message:
    if set(one.axes) <= {"sequence"} or one.axes == ("expert",):
        return one
    ranks = 1
    axes = ("shard", "sequence") if set(one.axes) & {"shard", "sequence"} else one.axes
    for axis in axes:
        ranks *= after[axis]
    sharing = before["shard"] * before["sequence"] / (after["shard"] * after["sequence"])
    factor = {"all_gather": one.ranks / ranks}.get(one.kind, sharing if one.axes == ("replicate",) else 1.0)
    return replace(one, axes=axes, ranks=ranks, bytes=round(one.bytes * factor))


@dataclass(frozen=True, kw_only=True)
class TimedMesh:
    """A mesh and the time of a step on it. `step.tokens` differ where the step has a micro-batch for each rank."""

    shape: MeshShape
    step: StepTime

    @property
    def each(self) -> float:
        """Seconds for a token."""
        return self.step.seconds / self.step.tokens


def by_time(
    plan: Plan, probe: MeshShape, ranks: int, tokens: int, links: Links, *, tokens_per_step: int | None, shared: bool
) -> list[TimedMesh]:
    """Return every mesh of `ranks` with the time of a step of micro-batches of `tokens`, the fastest first.

    Args:
        plan: Drafted on the mesh `probe`.
        tokens_per_step: Of all ranks; a mesh of which one micro-batch for each rank is more is left out. None: a step
            has one micro-batch for each rank.
        shared: Whether rows of tokens can be shared.
    """
    found = []
    arithmetic = counted(plan, tokens)
    sent = cache(plan.messages)  # on many meshes as many ranks share a row
    for shape in shapes(ranks, probe.expert, shared=shared):
        once = tokens * shape.replicate * shape.shard
        if tokens_per_step is not None and once > max(tokens_per_step, tokens):
            continue
        batches = -(-tokens_per_step // once) if tokens_per_step else 1
        work = Workload(tokens=tokens, micro_batches=batches, sequence=shape.sequence)
        try:
            messages = timed(resized(sent(work), probe, shape), shape.sizes, links)
        except PlanError:  # a technique's settings do not allow so many ranks
            continue
        step = step_time(plan, work, messages, shape.sizes, links, arithmetic)
        found.append(TimedMesh(shape=shape, step=step))
    # of equal times that with fewer exchanges, and then that with less memory
    return sorted(found, key=lambda one: (float(f"{one.each:.2e}"), one.shape.sequence, -one.shape.shard))


class MemoryOfMeshes:
    """The memory of a rank on any mesh, from few traces.

    Args:
        traced: From a mesh to the peak of a rank.
        most: How many meshes are traced at most.
    """

    def __init__(self, traced: Callable[[MeshShape], Peak], most: int = MOST_TRACES):
        self.traced, self.left = traced, most
        self.known: dict[tuple[int, int], Peak] = {}  # by ranks that share a row, and weights

    def know(self, shape: MeshShape, peak: Peak) -> None:
        """Take the peak of a mesh that is traced already."""
        self.known[shape.sequence, shape.sharing] = peak

    def bytes(self, shape: MeshShape) -> float | None:
        """Return the bytes on the device, or None if no more meshes may be traced."""
        key = (shape.sequence, shape.sharing)
        if key not in self.known:
            if self.left == 0:
                return None
            self.left -= 1
            self.know(shape, self.traced(shape))
        return self.known[key].device

    def at_least(self, shape: MeshShape) -> float:
        """Return what a rank needs at least, by what is known of meshes of which no more ranks share a row."""
        known = (
            _least(peak, states=sharing / shape.sharing, tokens=sequence / shape.sequence)
            for (sequence, sharing), peak in self.known.items()
            if sequence <= shape.sequence
        )
        return max(known, default=0.0)


def _least(peak: Peak, *, states: float, tokens: float) -> float:
    """Return the bytes on a device of which states are so many times as large, and what grows with tokens at least.

    Of gradients, a backward has all, some or none before the end, besides buffers of the unit that is summed.
    """
    factors: dict[Category, float] = {category: 1.0 if category in KEPT else tokens for category in CATEGORIES}
    factors |= {"parameters": states, "technique": states, "optimizer": states}
    everything = peak.phases["step"]["gradients"]
    phases = []
    for phase, categories in peak.phases.items():
        total = sum(value * factors[category] for category, value in categories.items())
        there = min(categories["gradients"], everything) if states < 1 or phase == "step" else 0.0
        phases.append(total + (states - 1) * there)
    return peak.reserved + max(phases)


Needed = tuple[TimedMesh, float | None]  # bytes of a rank, where there is a limit


def recommended(
    meshes: Sequence[TimedMesh], memory: MemoryOfMeshes | None, limit: float | None, most: int = 3
) -> tuple[list[Needed], list[Needed]]:
    """Return of `meshes` that fit into `limit` bytes, the fastest for each length of `sequence`, `most` of them; and
    the faster ones that do not fit. Without a limit each fits."""
    fitting: list[Needed] = []
    refused: list[Needed] = []
    for one in meshes:
        if len(fitting) == most:
            break
        if any(one.shape.sequence == better.shape.sequence for better, _ in fitting):
            continue
        needed = None
        if memory is not None and limit is not None:
            least = memory.at_least(one.shape)
            needed = least if least > limit else memory.bytes(one.shape)
            if needed is None:  # it would have to be traced
                continue
            if needed > limit:
                refused += [] if fitting else [(one, needed)]
                continue
        fitting.append((one, needed))
    return fitting, refused


def mesh_lines(fitting: Sequence[Needed], refused: Sequence[Needed], limit: float | None) -> list[str]:
    """Return the lines of a report of `recommended`."""
    lines = [_line(*one) for one in fitting]
    if fitting:
        which = "" if limit is None else " of those that fit"
        lines.append(f"least time{which}: mesh: {fitting[0][0].shape}")
    if refused:
        one, needed = refused[0]
        more = f", and so do {len(refused) - 1} more" if len(refused) > 1 else ""
        size = f"{(needed or 0) / 2**30:.1f} GiB"
        lines.append(f"would be faster and do not fit: {one.shape} needs at least {size}{more}")
    if limit is not None and not fitting:
        lines.append("no mesh of these ranks fits")
    return lines


def _line(one: TimedMesh, needed: float | None) -> str:
    step = one.step
    memory = "" if needed is None else f"; {needed / 2**30:.1f} GiB"
    return (
        f"{one.shape!s:<42}{1e6 * one.each:>9.3g} µs a token: a step of {step.tokens:,} takes {step.seconds:.3g} s, "
        f"arithmetic {step.computing:.3g}, messages {step.waiting:.3g} and {step.overlapping:.3g} during it{memory}"
    )
