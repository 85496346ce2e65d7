"""Collecting rows during training: pairs of each backward, finished rows of each step, shards at checkpoints.

Between checkpoints rows wait in host memory. A checkpoint of the run contains how many shards there are; a run that
resumes from it drops shards that were written later, and collects these steps again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.core.errors import DataError, PlanError
from treering.core.topology import axis_size
from treering.curvature.batch_tokens import NUMBERS, BatchTokens
from treering.curvature.capture import install_capture
from treering.curvature.factors import GradientFactors
from treering.curvature.labels import with_gradient
from treering.curvature.pairs import Capture, Pair
from treering.curvature.targets import Target, TargetPairs, targets_of
from treering.curvature.vocabulary import Coverage
from treering.sketches import encode_rows
from treering.sketches.gradient_rows import GradientRows
from treering.technique import Applied, Site
from treering.techniques.collect.shards import CollectedShards, Waiting

if TYPE_CHECKING:
    from treering.techniques.collect.settings import CollectSettings


def install(model: nn.Module, config: "CollectSettings", site: Site) -> Applied:
    """Observe what trains, as `Collect` describes it."""
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise PlanError(
            "collect: compiled blocks do not show the gradients of their layers; leave compile out",
            settings=("collect", "compile"),
        )
    factors = _factors(config, site)
    coverage = Coverage(of=config.cover) if factors is None else factors.coverage
    targets, left_out = targets_of(model, site.anatomy, site.maps, coverage)
    if not targets:
        raise PlanError(
            "collect: no matrix of a layer inside the blocks trains in a way that its gradient can be seen; leave "
            "collect out",
            settings=("collect",),
        )
    if axis_size(site.mesh, "expert") > 1 and any(target.experts for target in targets.values()):
        raise PlanError(
            "collect: experts are assigned to ranks, so that rows of other ranks' documents reach them, and their "
            "gradients cannot be told apart there; leave expert out of the mesh, or collect out",
            settings=("mesh.expert", "collect"),
        )
    _refuse_unmeasured(factors, targets)
    collector = Collector(model, config, site, targets, factors)
    weights = {target.weight for target in targets.values()}
    undo = install_capture(model, site.anatomy, weights, collector.seen, rooted=False)
    note = f"rows of {len(targets)} tensors that train, into {config.to}"
    return Applied(
        undo=undo,
        watch=collector.watch,
        gradients=collector.complete,
        after_step=collector.stepped,
        state=collector.state,
        finish=collector.finish,
        metrics=collector.metrics,
        notes=(note, *(f"not collected: {weight}, {reason}" for weight, reason in list(left_out.items())[:3])),
    )


def _factors(config: "CollectSettings", site: Site) -> GradientFactors | None:
    if config.curvature == "identity":
        return None
    factors: GradientFactors | None = getattr(site.statistics, "gradients", None)
    if factors is None:
        raise PlanError(
            f"collect: curvature is {config.curvature}, and the run has no statistics with gradients; measure them "
            f"(treering measure --gradients {config.curvature}) and name the folder as statistics.path, or set "
            "curvature: identity",
            settings=("collect.curvature", "statistics.path"),
        )
    if unfit := factors.unfit(config.curvature, config.cover):
        raise PlanError(
            f"collect: the statistics do not fit: {unfit}, or set curvature: identity",
            settings=("collect.curvature", "collect.cover", "statistics.path"),
        )
    return factors


def _refuse_unmeasured(factors: GradientFactors | None, targets: Mapping[str, Target]) -> None:
    if factors is not None and (missing := [name for name in targets if name not in factors]):
        raise PlanError(
            f"collect: the statistics have no factors of {missing[0]}, which trains; measure the gradients of a run "
            "with the same techniques, or set curvature: identity",
            settings=("collect.curvature", "statistics.path"),
        )


class Collector:
    """Sees the pairs of each backward, and keeps the rows of its documents."""

    def __init__(
        self,
        model: nn.Module,
        config: "CollectSettings",
        site: Site,
        targets: Mapping[str, Target],
        factors: GradientFactors | None,
    ):
        self.model, self.config, self.site = model, config, site
        self.targets, self.factors = dict(targets), factors
        self.has_stepped = False
        self.shards: CollectedShards | None = None  # made with the first batch: planning a run writes nothing
        self.seen = Capture(TargetPairs(targets.values(), self))
        self.count = torch.zeros((), dtype=torch.int64)  # of shards, as the last checkpoint knows it
        self.steps = torch.zeros((), dtype=torch.int64)  # taken so far
        self.documents = self.dropped = self.watched = 0
        self._open: dict[BatchTokens, _BatchRows] = {}
        self._computed: list[Waiting] = []  # since the last step
        self._stepping: list[Waiting] = []  # of a step that is being decided: one that is skipped trains on nothing
        self._groups = [site.mesh["sequence"].get_group()] if axis_size(site.mesh, "sequence") > 1 else []  # type: ignore[index]

    @contextmanager
    def watch(self, batch: dict[str, Any]) -> Iterator[Any]:
        """See the backward of the loss that is computed inside. Gives what the loss passes through."""
        if NUMBERS not in batch:  # memory is planned from shapes alone
            yield lambda share: share
            return
        if self._computed and all(parameter.grad is None for parameter in self.model.parameters()):
            # The loop discarded these gradients without a step: a gradient scaler skips one without calling any hook.
            self.complete()
        shards = self._shards(batch["input_ids"].device)
        numbers = with_gradient(batch[NUMBERS].cpu(), batch["targets"].cpu())
        tokens = BatchTokens(numbers, batch["targets"], self._names(batch, numbers))
        ids = [f"{name}@{int(self.steps)}" for name in tokens.names]
        rows = _BatchRows(shards, self.targets, ids, self._groups)
        self._open[tokens] = rows
        self.watched += 1
        self.seen.batch = tokens
        try:
            yield lambda share: _Watched.apply(share, lambda slope: self._begin(tokens, batch["count"], slope))
        finally:
            self.seen.batch = None

    def take(self, pair: Pair) -> None:
        """Add what a pair gives."""
        if pair.batch in self._open:
            self._open[pair.batch].take(pair)

    def _begin(self, tokens: BatchTokens, count: int, slope: Tensor) -> None:
        """Called at the start of a backward, whose loss is `slope` times the sum over tokens / `count`."""
        rows = self._open.get(tokens)
        if rows is None:  # a second backward through one graph
            return
        self.seen.batch = tokens
        rows.scale = count / slope.detach().double()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(tokens))  # type: ignore[attr-defined]

    def _end(self, tokens: BatchTokens) -> None:
        """Called at the end of the backward."""
        self.seen.batch = None
        rows = self._open.pop(tokens)
        found = rows.rows()
        lengths = torch.bincount(tokens.documents_T[tokens.documents_T >= 0], minlength=len(rows.ids)).tolist()
        good = rows.finite.nonzero().squeeze(1)
        self.dropped += len(rows.ids) - len(good)
        self.documents += len(good)
        kept = {module: {name: x[good] for name, x in tensors.items()} for module, tensors in found.items()}
        self._computed.append(([rows.ids[i] for i in good.tolist()], [lengths[i] for i in good.tolist()], kept))

    def complete(self) -> None:
        """Take what was computed as the rows of one step; drop those of the step before if it was skipped."""
        self._drop_skipped()
        self._stepping, self._computed = self._computed, []

    def _drop_skipped(self) -> None:
        documents = sum(len(ids) for ids, _, _ in self._stepping)
        self.documents, self.dropped, self._stepping = self.documents - documents, self.dropped + documents, []

    def stepped(self) -> None:
        """Count a step that was taken; refuse one whose gradients were not seen."""
        if not self.watched:
            raise PlanError(
                "collect: a step was taken, and no loss was computed by run.loss since the one before, so none of its "
                "documents has a row; compute the loss by run.loss(batch)",
                settings=("collect",),
            )
        for ids, tokens, rows in self._stepping:
            assert self.shards is not None
            self.shards.keep(ids, tokens, rows)
        self._stepping = []
        self.steps, self.watched, self.has_stepped = self.steps.add_(1), 0, True
        self._open.clear()  # losses whose backward never came

    def state(self) -> dict[str, Tensor]:
        """Write what waits, and return how many shards and steps there are. A collective."""
        if self.shards is not None:
            self.count.fill_(self.shards.flush())
        return {"collect.shards": self.count, "collect.steps": self.steps}

    def finish(self) -> None:
        """Write what waits, and list all shards in the index. A collective."""
        if self.watched and not self.has_stepped:
            raise PlanError(
                "collect: losses were computed, and no step was seen that trains on them, so no document has a row; "
                "step with run.step(optimizer), or call run.attach(optimizer) before a loop of your own",
                settings=("collect",),
            )
        self.complete()
        self._drop_skipped()  # and what no step followed
        if self.shards is not None:
            self.count.fill_(self.shards.flush())
            self.shards.publish()

    def metrics(self) -> dict[str, float]:
        """Return how many documents have a row, and how many have none: not finite, or no step taken."""
        return {"collect/documents": float(self.documents), "collect/dropped": float(self.dropped)}

    def _names(self, batch: dict[str, Any], numbers: Tensor) -> tuple[str, ...]:
        """Return the names of the documents."""
        names, most = tuple(batch.get("samples", ())), int(numbers.max()) + 1
        if len(names) < most:
            raise DataError(
                f"a micro-batch has {most} documents and names {len(names)} of them, so their rows could not be found "
                "again; give each micro-batch `samples`, a list with a name for each document, or none"
            )
        return names

    def _shards(self, device: torch.device) -> CollectedShards:
        if self.shards is None:
            self.shards = CollectedShards.of(
                self.config, self.targets, self.factors, self.site, device, int(self.count)
            )
        return self.shards


class _BatchRows(GradientRows):
    """The rows of one batch, encoded module by module. `finite`: of which documents all numbers are finite so far."""

    def __init__(self, shards: CollectedShards, targets: Mapping[str, Target], ids: list[str], groups: Any):
        super().__init__(shards.maps, targets, self._encoded, groups=groups)
        self.ids, self.recipe = ids, shards.recipe
        self.modules = {module.name: module for module in shards.recipe.modules}
        self.finite = torch.ones(len(ids), dtype=torch.bool)
        self.begin(len(ids))

    def _encoded(self, module: str, rows: Tensor) -> dict[str, Tensor]:
        finite = torch.isfinite(rows).all(1)
        self.finite &= finite.cpu()
        return encode_rows(self.recipe, self.modules[module], torch.where(finite[:, None], rows, 0.0), self.ids)


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, begin: Any) -> Tensor:
        ctx.begin = begin
        return share.view_as(share)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        ctx.begin(slope)
        return slope, None
