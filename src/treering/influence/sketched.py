"""From documents to rows of an index: what a build and a query share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from treering.core.errors import CheckpointError
from treering.core.topology import axis_size
from treering.core.weights_digest import weights_digest
from treering.curvature import GradientFactors, Statistics
from treering.curvature.capture import capture
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.targets import Target, TargetPairs, targets_of
from treering.curvature.vocabulary import Cover, Coverage
from treering.data.document import Document
from treering.data.loader import collate_measured
from treering.plan import Run
from treering.sketches import IndexRecipe, ModuleMap, SketchSettings, recipe_of
from treering.sketches.gradient_rows import Finish, GradientRows, maps_of

RowsOf = Callable[[Sequence[Document], Finish], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sketched:
    """How the gradients of a run become rows of an index.

    Attributes:
        run: the model.
        targets: what trains and is indexed, by name.
        maps: of each module.
        recipe: of the index.
        left_out: what is not in it, and why.
    """

    run: Run
    targets: dict[str, Target]
    maps: dict[str, ModuleMap]
    recipe: IndexRecipe
    left_out: dict[str, str]

    @classmethod
    def of(
        cls, run: Run, settings: SketchSettings, statistics: Statistics | None, about: Mapping[str, str] | None = None,
        cover: Cover = "blocks",
    ) -> "Sketched":  # fmt: skip
        """Return the maps of a run. A collective where the run is sharded.

        Args:
            statistics: with gradients, of the run as it is now; None with curvature `identity`.
            about: what else an index and its queries have to agree in, as texts by name.
            cover: matrices inside the `blocks`, or `all`; of which the statistics have to be.
        """
        factors = None if settings.curvature == "identity" else _factors(statistics, settings, cover)
        coverage = Coverage(of=cover) if factors is None else factors.coverage
        targets, left_out = targets_of(run.model, run.plan.anatomy, run.plan.maps(), coverage)
        model = weights_digest(run.model)
        if factors is not None:
            _refuse_other_model(factors, model, str(statistics.where if statistics else ""))
        every, without = maps_of(settings, targets, factors)
        maps = {name: one.to(run.plan.device) for name, one in every.items()}
        digests = {} if factors is None else {"statistics": factors.digest, "basis": factors.digest}
        recipe = recipe_of(maps.values(), settings, model=model, about=about, cover=cover, **digests)
        return cls(run=run, targets=targets, maps=maps, recipe=recipe, left_out=left_out | without)

    @contextmanager
    def rows(self, *, query: bool = False) -> Iterator[RowsOf]:
        """Give a function from documents and `finish` to what `finish` keeps of each module; see `GradientRows`.

        A collective: all ranks call it equally often, those without documents with none. Ranks that share a sequence
        give the same documents, and get the same rows.
        """
        run, subject = self.run, MeasuredModel.of(self.run, None, None)
        mesh = run.plan.mesh
        groups = [mesh["sequence"].get_group()] if mesh is not None and axis_size(mesh, "sequence") > 1 else []
        weights = {target.weight for target in self.targets.values()}
        sink = GradientRows(self.maps, self.targets, query=query, groups=groups)
        pairs = TargetPairs(self.targets.values(), sink)
        with evaluating(run.model), capture(run.model, run.plan.anatomy, weights, pairs) as seen:

            def rows_of(documents: Sequence[Document], finish: Finish) -> dict[str, Any]:
                sink.finish = finish
                sink.begin(len(documents))
                batch = collate_measured(documents, packing_of(run))
                subject.backward(seen, batch, batch.pop("real", None), "data", 0)
                return sink.rows()

            yield rows_of


def packing_of(run: Run) -> Literal["on", "off"]:
    """Return whether documents are packed into one row."""
    return "off" if run.plan.unpackable else "on"


def _factors(statistics: Statistics | None, settings: SketchSettings, cover: Cover) -> GradientFactors:
    where = "there are no statistics" if statistics is None else f"{statistics.where} has none of gradients"
    factors = None if statistics is None else statistics.gradients
    if factors is None:
        raise CheckpointError(
            f"curvature {settings.curvature} needs the gradients of a measurement, and {where}: treering measure MODEL "
            f"--data FILE --gradients {settings.curvature} --to DIR"
        )
    if unfit := factors.unfit(settings.curvature, cover):
        raise CheckpointError(f"{statistics.where if statistics else ''} does not fit the index: {unfit}")
    return factors


def _refuse_other_model(factors: GradientFactors, model: str, where: str) -> None:
    if factors.model != model:
        raise CheckpointError(
            f"{where} was measured on other weights than the model has now; its directions are not those of these "
            "gradients: measure this model"
        )
