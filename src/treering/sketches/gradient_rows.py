"""From the pairs of a backward to the rows of documents: what a build, a query and a collection in training share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.curvature import GradientFactors
from treering.curvature.capture import Pair
from treering.curvature.targets import Target
from treering.sketches.maps import ModuleMap, SideBasis, module_map
from treering.sketches.rows import RowSums, TokenSpans
from treering.sketches.settings import SketchSettings


def module_names(target: Target) -> tuple[str, ...]:
    """Return the modules of an index that a target gives: one, or one for each expert."""
    if target.experts is None:
        return (target.name,)
    return tuple(f"{target.name}[{expert}]" for expert in range(target.experts))


def maps_of(
    settings: SketchSettings, targets: Mapping[str, Target], factors: GradientFactors | None
) -> dict[str, ModuleMap]:
    """Return the map of every module of `targets`.

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
    for name, target in targets.items():
        plain = {"outputs": target.outputs, "inputs": target.inputs}
        if settings.curvature == "identity":
            maps |= {module: module_map(settings, module, **plain) for module in module_names(target)}
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
            maps[module] = module_map(
                settings,
                module,
                **plain,
                input_basis=SideBasis(values=one(E_A, 1), vectors=one(Q_A, 2)),
                gradient_basis=SideBasis(values=one(E_S, 1) * c.float(), vectors=one(Q_S, 2)),
                corrected=None if corrected is None else one(corrected, 2),
            )
    return maps


class GradientRows:
    """A sink of pairs that adds up the rows of the documents of one batch.

    Args:
        maps: of every module.
        targets: what the pairs are of, by name.
    """

    def __init__(self, maps: Mapping[str, ModuleMap], targets: Mapping[str, Target]):
        self.maps = dict(maps)
        self.names = {name: module_names(target) for name, target in targets.items()}
        self.sums = RowSums(self.maps, 0)

    def begin(self, documents: int) -> None:
        """Begin with a batch of so many documents."""
        self.sums = RowSums(self.maps, documents)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """Add what a pair gives."""
        names = self.names[pair.weight]
        segments = pair.batch.segments(pair.rows, pair.experts)
        if pair.experts is None:
            self.sums.add(names[0], pair.a_RM, pair.g_RN, _spans(segments, 0))
            return
        by_expert: dict[int, list[tuple[int, int, int]]] = {}
        for segment in segments:
            by_expert.setdefault(segment.expert, []).append((segment.document, segment.start, segment.stop))
        for expert, pieces in by_expert.items():
            first, last = pieces[0][1], pieces[-1][2]
            spans = _spans([(d, 0, start, stop) for d, start, stop in pieces], first)
            self.sums.add(names[expert], pair.a_RM[first:last], pair.g_RN[first:last], spans)


def _spans(segments: Sequence[tuple[int, int, int, int]], first: int) -> TokenSpans:
    """Return segments (document, expert, start, stop) as spans that are counted from `first`."""
    if not segments:
        return TokenSpans(documents=(), starts=(), stops=())
    documents, _, starts, stops = zip(*segments)
    return TokenSpans(
        documents=documents, starts=tuple(s - first for s in starts), stops=tuple(s - first for s in stops)
    )
