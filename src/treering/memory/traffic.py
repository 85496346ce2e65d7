"""How long the messages and the arithmetic of a step take, by a model of the links between ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treering.core.links import Links
from treering.core.pairing import partner, rounds
from treering.core.topology import AXES, EXPERT_AXES, axis_size
from treering.memory.operations import Operations, operations
from treering.plan.explain import size
from treering.plan.plan import Plan
from treering.technique import Message, Workload

MOST_PAIRS, MOST_ROUNDS = 32, 8  # that are printed of a schedule


def sizes_of(plan: Plan) -> dict[str, int]:
    """Return the number of ranks along each axis of the mesh of `plan`."""
    expert = axis_size(plan.mesh, "expert")
    sizes = {axis: axis_size(plan.mesh, axis) for axis in AXES}
    return sizes | {"expert": expert, "efsdp": sizes["shard"] * sizes["sequence"] // expert}


def stride(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Return by how much the numbers of neighbouring ranks along `axes` differ."""
    order = EXPERT_AXES if set(axes) & {"efsdp", "expert"} else AXES
    apart = 1
    for axis in reversed(order):
        if axis in axes:
            return apart
        apart *= sizes[axis]
    raise AssertionError(f"{axes} are no axes of a mesh")


@dataclass(frozen=True, kw_only=True)
class TimedMessage:
    """One kind of message of a step: bytes that a rank sends inside its node and to others, and the time it takes."""

    technique: str
    message: Message
    inside: float
    between: float
    seconds: float


def timed(messages: Sequence[tuple[str, Message]], sizes: Mapping[str, int], links: Links) -> list[TimedMessage]:
    """Return `messages` with their bytes by link, and their times. `sizes`: ranks along each axis."""
    found = []
    for name, one in messages:
        apart = stride(one.axes, sizes) * one.stride
        ring = one.kind != "all_to_all"
        inside, between = links.divided(one.sent, one.ranks, apart, ring=ring)
        seconds = links.seconds(one.sent, one.ranks, apart, one.calls, ring=ring)
        found.append(TimedMessage(technique=name, message=one, inside=inside, between=between, seconds=seconds))
    return found


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on one rank.

    Attributes:
        products, attention: Of the arithmetic.
        waiting: Of messages that nothing is computed during.
        overlapping: Of messages that are sent during the arithmetic.
        tokens: Of all ranks in the step.
    """

    products: float
    attention: float
    waiting: float
    overlapping: float
    tokens: int

    @property
    def computing(self) -> float:
        return self.products + self.attention

    @property
    def seconds(self) -> float:
        return max(self.computing, self.overlapping) + self.waiting


def counted(plan: Plan, tokens: int) -> Operations:
    """Return the operations of a micro-batch of the complete row, those of a teacher included."""
    one = operations(plan, tokens)
    if plan.teacher is None:
        return one
    other = operations(plan.teacher, tokens)
    return Operations(products=one.products + other.products, attention=one.attention + other.attention)


def step_time(
    plan: Plan,
    work: Workload,
    messages: Sequence[TimedMessage],
    sizes: Mapping[str, int],
    links: Links,
    arithmetic: Operations,
) -> StepTime:
    """Return the time of a step of `work` on a mesh of `sizes`, of which `messages` are the messages."""
    shares = [applied.busiest(work) for applied in plan.applied if applied.busiest is not None]
    spent = work.micro_batches / links.arithmetic
    return StepTime(
        products=arithmetic.products / sizes["sequence"] * spent,
        attention=arithmetic.attention * max([1 / sizes["sequence"], *shares]) * spent,
        waiting=sum(one.seconds for one in messages if not one.message.overlaps),
        overlapping=sum(one.seconds for one in messages if one.message.overlaps),
        tokens=work.tokens * work.micro_batches * sizes["replicate"] * sizes["shard"],
    )


def report(plan: Plan, work: Workload, links: Links) -> str:
    """Return lines with the bytes of each kind of message by link, and the time of a step."""
    sizes = sizes_of(plan)
    messages = timed(plan.messages(work), sizes, links)
    if not messages:
        return ""
    lines = [f"on nodes of {links.node} ranks, {_speeds(links)}"]
    for one in messages:
        lines.append(
            f"  {one.technique:<10}{one.message.kind:<15}{size(round(one.inside)):>10} inside a node,"
            f"{size(round(one.between)):>11} to others, {_seconds(one.seconds):>8} for {one.message.content}"
            + (", while it computes" if one.message.overlaps else "")
        )
    time = step_time(plan, work, messages, sizes, links, counted(plan, work.tokens))
    sent = time.waiting + time.overlapping
    lines += [
        f"  arithmetic {_seconds(time.computing)} (attention {_seconds(time.attention)}); messages {_seconds(sent)}, "
        f"{_seconds(time.waiting)} while nothing is computed; arithmetic : messages {_ratio(time.computing, sent)}",
        f"  a step of {time.tokens:,} tokens takes at least {_seconds(time.seconds)}: "
        f"{time.tokens / time.seconds:,.0f} tokens a second",
    ]
    return "\n".join(lines)


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.3g}" if other else "∞"


def _speeds(links: Links) -> str:
    inside, between, arithmetic = links.inside / 1e9, links.between / 1e9, links.arithmetic / 1e12
    return f"{inside:g} GB/s inside one and {between:g} GB/s between them, {arithmetic:g} TFLOP/s"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.2f} ms"


def schedule_lines(ranks: int) -> list[str]:
    """Return the rounds of `transport: paired` among `ranks` of the axis `sequence`; of many, the first ones."""
    number = rounds(ranks)
    lines = [f"rounds of pairs (transport: paired) among {ranks} ranks of the axis sequence: {number}"]
    for round_ in range(min(number, MOST_ROUNDS)):
        pairs, resting, shown = 0, "", []
        for rank in range(ranks):
            other = partner(rank, round_, ranks)
            if other is None:
                resting = f", {rank} rests"
            elif rank < other:
                pairs += 1
                shown += [f"{rank}–{other}"] if pairs <= MOST_PAIRS else []
        more = f" and {pairs - MOST_PAIRS} more" if pairs > MOST_PAIRS else ""
        lines.append(f"  round {round_}: {', '.join(shown)}{more}{resting}")
    return lines + ([f"  and {number - MOST_ROUNDS} more rounds"] if number > MOST_ROUNDS else [])
