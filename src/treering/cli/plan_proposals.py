"""The smallest change of a configuration with which its run fits into the memory of devices and of their hosts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from treering.core.errors import PlanError

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig
    from treering.memory import Peak
    from treering.memory.meshes import MeshShape
    from treering.memory.search import Switch
    from treering.technique import Variant

MOST_RANKS = 1024  # that are proposed


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What there is: bytes of a device, and of the host memory of a node of so many ranks; None: not given."""

    device: int | None
    host: int | None
    node: int

    def allow(self, peak: "Peak", ranks: int) -> bool:
        """Return whether a run on `ranks` fits, which needs `peak` on each."""
        device = self.device is None or peak.device <= self.device
        return device and (self.host is None or self.on_node(peak, ranks) <= self.host)

    def on_node(self, peak: "Peak", ranks: int) -> float:
        """Return the bytes of host memory that the ranks of one node need together."""
        return peak.host * min(self.node, ranks)

    def line(self, peak: "Peak", ranks: int) -> str:
        """Return what a run needs of both."""
        from treering.plan.explain import size

        device = f"{size(int(peak.device))} on each rank"
        if peak.host < 2**30 / 100:
            return device
        of = "" if self.host is None else f" of {size(self.host)}"
        return f"{device}, {size(int(self.on_node(peak, ranks)))}{of} of host memory on a node"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The configuration and the number of ranks, which the search for a run that fits changes."""

    config: "RunConfig"
    ranks: int

    def but(self, **techniques: Any) -> "PlannedRun":
        """Return the run with other settings of techniques."""
        changed = replace(self.config.techniques, **techniques)
        return replace(self, config=replace(self.config, techniques=changed))

    def on(self, shape: "MeshShape") -> "PlannedRun":
        """Return the run on another mesh of as many ranks."""
        sizes = {axis: shape.sizes[axis] for axis in asdict(self.config.mesh)}
        return replace(self, config=replace(self.config, mesh=replace(self.config.mesh, **sizes)))


def proposed(
    state: PlannedRun,
    limits: Capacity,
    peak_of: "Callable[[PlannedRun], Peak | None]",
    refuse_unusable: Callable[[PlannedRun], None],
) -> list[str]:
    """Return the lines of the smallest change with which the run fits.

    Args:
        peak_of: From a run to its peak; None: it does not fit.
        refuse_unusable: Raises PlanError for a run whose techniques refuse the model or each other.
    """
    from treering.memory.search import smallest

    tried_before: list[tuple[PlannedRun, Peak | None]] = []  # None: it does not fit

    def fits(tried: PlannedRun) -> bool:
        for state, peak in tried_before:
            if state == tried:
                return peak is not None
        try:
            peak = peak_of(tried)
        except PlanError:  # what it does depends on values, and cannot be traced
            return False
        allowed = peak is not None and limits.allow(peak, tried.ranks)
        tried_before.append((tried, peak if allowed else None))
        return tried_before[-1][1] is not None

    def needs(tried: PlannedRun) -> str:
        return limits.line(next(peak for state, peak in tried_before if state == tried and peak), tried.ranks)

    switches = _usable(state, refuse_unusable)
    ranks = state.ranks
    while ranks <= MOST_RANKS:
        tried = replace(state, ranks=ranks)
        if ranks > state.ranks and fits(tried):
            return [f"would fit: {ranks} ranks, with {needs(tried)}"]
        # What is offloaded needs host memory: where there is not enough, the switches that cost most are left out.
        fewest = 1 if limits.host is not None else len(switches)
        cut = (smallest(tried, switches[:count], fits) for count in range(len(switches), fewest - 1, -1))
        chosen = next((found for found in cut if found is not None), None)
        if chosen is not None:
            more = [f"{ranks} ranks"] if ranks > state.ranks else []
            names = ", ".join([*more, *(switch.name for switch in chosen)])
            lines = [f"would fit with {names}:", *(f"    {switch.config}" for switch in chosen)]
            for switch in chosen:
                tried = switch.on(tried) or tried
            return [*lines, f"  with {needs(tried)}"]
        if state.config.techniques.shard is None:
            break
        ranks *= 2
    return ["no proposal of a technique makes it fit; shorten the sequence, or shard over more ranks"]


def _usable(state: PlannedRun, refuse_unusable: Callable[[PlannedRun], None]) -> "list[Switch[PlannedRun]]":
    """Return the switches that this model and the rest of the configuration accept."""
    usable: list[Switch[PlannedRun]] = []
    for switch in _switches():
        changed = switch.on(state)
        if changed is None:
            continue
        try:
            refuse_unusable(changed)
        except PlanError:
            continue
        state, usable = changed, [*usable, switch]
    return usable


def _switches() -> "list[Switch[PlannedRun]]":
    """Return what the techniques propose, ordered by what it costs, least first."""
    from treering.memory.search import Switch
    from treering.techniques import TECHNIQUES

    proposed = [(key, one) for key, cls in TECHNIQUES.items() if hasattr(cls, "lighter") for one in cls.lighter()]
    proposed.sort(key=lambda pair: pair[1].order)
    return [Switch(name=one.name, config=one.config, on=partial(_with, key, one)) for key, one in proposed]


def _with(key: str, variant: "Variant", state: PlannedRun) -> PlannedRun | None:
    """Return the run with `variant` of the technique `key`, or None where it is on already or needs another one."""
    technique = variant.of(getattr(state.config.techniques, key))
    return None if technique is None else state.but(**{key: technique, **dict.fromkeys(variant.replaces)})
