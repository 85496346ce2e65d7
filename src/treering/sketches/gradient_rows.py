"""From the pairs of a backward to the rows of documents: what a build, a query and a collection in training share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.errors import CheckpointError, TreeringError
from treering.curvature import GradientFactors
from treering.curvature.batch_tokens import Segment
from treering.curvature.observer import same_memory
from treering.curvature.pairs import Pair
from treering.curvature.targets import Target
from treering.sketches.maps import ModuleMap, SideBasis, module_map
from treering.sketches.rows import RowSums, TokenSpans
from treering.sketches.settings import SketchSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def module_names(target: Target) -> tuple[str, ...]:
    """Return the modules of an index that a target gives: one, or one for each expert."""
    if target.experts is None:
        return (target.name,)
    return tuple(f"{target.name}[{expert}]" for expert in range(target.experts))


def maps_of(
    settings: SketchSettings, targets: Mapping[str, Target], factors: GradientFactors | None
) -> tuple[dict[str, ModuleMap], dict[str, str]]:
    """Return the map of every module of `targets`, and why a module has none: no gradient reached it in the measured
    text, such as an expert that no token was routed to, or an adapter's A while B is 0.

    Args:
        factors: what was measured; None with curvature `identity`.
    """
    bases: dict[str, Tensor] = {}  # weights with the same inputs have one basis

    def read(key: str, name: str) -> Tensor:
        assert factors is not None
        if key not in bases:
            bases[key] = factors[name].read(key)
        return bases[key]

    maps: dict[str, ModuleMap] = {}
    without: dict[str, str] = {}
    for name, target in targets.items():
        N, M = target.outputs, target.inputs
        if settings.curvature == "identity":
            maps |= {module: module_map(settings, module, N, M) for module in module_names(target)}
            continue
        if factors is None or name not in factors:
            raise CheckpointError(
                f"{name} has no factors in the statistics; measure the gradients of this run: treering measure, or "
                "leave its weight out"
            )
        keys, scale = factors[name].keys, factors[name].scale
        (Q_A, E_A), (Q_S, E_S) = (
            [read(keys[f"{side}.{piece}"], name) for piece in ("vectors", "values")] for side in ("inputs", "gradients")
        )
        corrected = factors[name].eigenvalues() if settings.curvature == "ekfac" else None
        for expert, module in enumerate(module_names(target)):
            one = lambda x, lead: x if x.ndim == lead else x[expert]  # noqa: B023, E731
            c = scale if scale.ndim == 0 else scale[expert]
            if not (bool(one(E_A, 1).any()) and bool(one(E_S, 1).any()) and float(c) > 0):
                without[module] = "no gradient reached it in the measured text"
                continue
            maps[module] = module_map(
                settings,
                module,
                N,
                M,
                input_basis=SideBasis(values=one(E_A, 1), vectors=one(Q_A, 2)),
                gradient_basis=SideBasis(values=one(E_S, 1) * c.float(), vectors=one(Q_S, 2)),
                corrected=None if corrected is None else one(corrected, 2),
            )
    return maps, without


class MappedInputs:
    """The inputs that were mapped last. Linears such as q, k and v follow each other with the same ones, and in an
    eigenbasis with the same map."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None  # a, its version, the map, the mapped inputs

    def of(self, mapped: ModuleMap, a_TM: Tensor) -> Tensor:
        """Return the inputs as `mapped.map_inputs` does."""
        if mapped.right is None:
            return mapped.map_inputs(a_TM)
        if self._last is not None:
            a, version, right, found = self._last  # referenced, so that their memory is not reused
            if version == a_TM._version and same_memory(a, a_TM) and same_memory(right, mapped.right):
                return found
        found = mapped.map_inputs(a_TM)
        self._last = a_TM, a_TM._version, mapped.right, found
        return found


Finish = Callable[[str, Tensor], Any]


class GradientRows:
    """A sink of pairs that gives the rows of the documents of one batch.

    A module is finished as soon as the last of its rows has come, so that no more than one complete gradient of each
    document exists at a time.

    Args:
        maps: of every module.
        targets: what the pairs are of, by name.
        finish: what is kept of the numbers [documents, numbers] of a module, called with its name.
        query: the documents are queries.
        groups: process groups whose ranks share the tokens of a document: their sums are added before `finish`.
    """

    def __init__(
        self,
        maps: Mapping[str, ModuleMap],
        targets: Mapping[str, Target],
        finish: Finish = lambda module, rows: rows,
        *,
        query: bool = False,
        groups: "Sequence[ProcessGroup]" = (),
    ):
        self.maps, self.finish, self.query, self.groups = dict(maps), finish, query, tuple(groups)
        self.names = {
            name: {expert: module for expert, module in enumerate(module_names(target)) if module in self.maps}
            for name, target in targets.items()
        }
        self.documents = 0
        self.scale: float | Tensor = 1.0  # by which the sums of the batch are multiplied
        self.finished: dict[str, Any] = {}
        self._sums: dict[str, RowSums] = {}
        self._inputs = MappedInputs()
        self._problem: TreeringError | None = None

    def begin(self, documents: int) -> None:
        """Begin with a batch of so many documents."""
        self.documents = documents
        self.finished, self._sums, self._problem = {}, {}, None
        self._inputs = MappedInputs()
        self.scale = 1.0

    def rows(self) -> dict[str, Any]:
        """Return what `finish` gave for each module, after the backward of the batch; or raise its first error, which
        would leave other ranks waiting if it were raised inside the backward. A collective with `groups`."""
        for target, names in self.names.items():
            if not self.finished.keys() >= set(names.values()):  # no token reached it
                self._finish(target)
        if self._problem is not None:
            raise self._problem
        return {module: self.finished[module] for module in self.maps}

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """Add what a pair gives."""
        names = self.names[pair.weight]
        if pair.weight not in self._sums:
            self._sums[pair.weight] = self._empty(pair.weight)
        sums, segments = self._sums[pair.weight], pair.batch.segments(pair.rows, pair.experts)
        if pair.experts is None and 0 in names:
            mapped = self.maps[names[0]]
            right, left = self._inputs.of(mapped, pair.a_RM), mapped.map_gradients(pair.g_RN)
            sums.add_mapped(names[0], right, left, _spans(segments, 0))
        by_expert: dict[int, list[Segment]] = {}
        for segment in segments if pair.experts is not None else ():
            by_expert.setdefault(segment.expert, []).append(segment)
        for expert, pieces in by_expert.items():
            if expert not in names:
                continue
            first, last = pieces[0].start, pieces[-1].stop
            sums.add(names[expert], pair.a_RM[first:last], pair.g_RN[first:last], _spans(pieces, first))
        if pair.rows.complete:
            self._finish(pair.weight)

    @torch.no_grad()
    def _finish(self, target: str) -> None:
        names = self.names[target].values()
        sums = self._sums.pop(target, None) or self._empty(target)
        for group in self.groups:
            for name in names:
                dist.all_reduce(sums.of(name), group=group)
        if not isinstance(self.scale, float):
            for name in names:
                sums.of(name).mul_(self.scale)
        rows = sums.query_rows() if self.query else sums.documents_rows(used_up=True)
        for name in names:
            try:
                self.finished[name] = self.finish(name, rows.pop(name))
            except TreeringError as error:
                self.finished[name], self._problem = None, self._problem or error

    def _empty(self, target: str) -> RowSums:
        return RowSums({name: self.maps[name] for name in self.names[target].values()}, self.documents)


def _spans(segments: Sequence[Segment], first: int) -> TokenSpans:
    """Return segments (document, expert, start, stop) as spans that are counted from `first`."""
    if not segments:
        return TokenSpans(documents=(), starts=(), stops=())
    documents, _, starts, stops = zip(*segments)
    return TokenSpans(
        documents=documents, starts=tuple(s - first for s in starts), stops=tuple(s - first for s in stops)
    )
