"""A model with its techniques in place, ready to train: what `compose` returns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from treering.core.errors import PlanError
from treering.core.sharded import settle
from treering.core.topology import axis_size
from treering.curvature.batch_tokens import with_documents
from treering.objectives import Objective, Scores, score_names
from treering.objectives.plain_loss import plain_loss
from treering.plan import batches, step
from treering.plan.batches import Batch, with_targets
from treering.plan.explain import explain
from treering.plan.export import Experts, export
from treering.plan.plan import Plan
from treering.plan.prepared import Prepared
from treering.plan.sequence import agree_along_sequence, copies, marked, refuse_undone, refuse_unmarked
from treering.plan.step import StepReport
from treering.plan.teacher import Teacher
from treering.plan.values import plain
from treering.technique import Workload


class Run:
    """A composed model, and the methods that a training loop calls.

    for micro_batches in run.steps(loader):
        for batch in micro_batches:
            run.loss(batch).backward()
        run.step(optimizer, clip=1.0)
    """

    def __init__(
        self,
        plan: Plan,
        lost: Mapping[str, float],
        max_skips: int = 5,
        notes: tuple[str, ...] = (),
        prepared: Prepared | None = None,
    ):
        self.plan = plan
        self.prepared = prepared  # the folder with the results of splitting
        self.notes = notes  # for the user, about how the weights were loaded
        self.model: Any = plan.model
        self.lost = lost  # plain name -> ‖join(split(W)) − W‖/‖W‖ at load
        self.max_skips = max_skips
        self.number = 0  # steps taken, skipped ones included
        self.skipped_in_a_row = 0
        self._samples: list[str] = []
        self._copies = 0  # on how many ranks each trained token is; 0: not known yet
        self._attached = self._undone = False
        self._cuts = any(applied.tokens is not None for applied in plan.applied)
        self._watching = [applied.watch for applied in plan.applied if applied.watch is not None]
        losses = [a.loss for a in plan.applied if a.loss is not None]
        self._loss = losses[0] if losses else plain_loss
        self._teacher = Teacher.of(plan)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copy and pickle: the hooks of techniques act on this run's model, and would do so in a copy, too."""
        raise PlanError(
            "a run cannot be copied or pickled: what its techniques do around a step belongs to its model. Copy the "
            "model (copy.deepcopy(run.model)) to compute with it, or compose() a fresh model for another run"
        )

    def explain(self, work: Workload | None = None) -> str:
        """Return the order of techniques, what each changes, and the memory and communication of a step of
        `work` (default: one micro-batch of 4,096 tokens)."""
        return explain(self.plan, self.lost, self.notes, work=work)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trained parameters by live name. No other has a gradient."""
        settle(self.model)
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def optimizer(self, kind: type[Optimizer] = torch.optim.AdamW, **settings: Any) -> Optimizer:
        """Return `kind` over the trainable parameters. Nothing decays unless `weight_decay` is given, whatever the
        default of `kind` is; then it acts on matrices, and not on vectors (norms, biases).

        Where parameters rest on the CPU, AdamW is the fused one, which is several times faster, unless `settings`
        choose otherwise.
        """
        return step.make_optimizer(self.trainable(), kind, settings)

    def steps(self, loader: Iterable[Batch | list[Batch]], *, accumulate: int = 1) -> Iterator[list[Batch]]:
        """Yield the micro-batches of one optimizer step at a time: counted over ranks, transformed, on the device."""
        if accumulate < 1:
            raise PlanError(f"accumulate is {accumulate}; a step takes at least 1 micro-batch")
        for micro_batches in batches.steps(loader, accumulate, self.plan.mesh):
            yield self._all_ready(micro_batches)

    def ready(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """Return counted micro-batches of one step, transformed by the techniques and on the device.

        A collective where a mesh has `sequence`: see `agree_along_sequence`.
        """
        agree_along_sequence(micro_batches, self.plan.mesh)
        return self._all_ready(micro_batches)

    def _all_ready(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        self._samples = [sample for batch in micro_batches for sample in batch.get("samples", ())]
        shifted = [with_targets(batch) for batch in micro_batches]
        ready = [self._ready(batch) for batch in shifted]
        mesh = self.plan.mesh
        if mesh is None or axis_size(mesh, "sequence") == 1 or not all("targets" in b for b in ready):
            return ready
        self._copies = self._copies or copies(shifted, ready, mesh)
        factor = self._copies or 1
        return [{**batch, "count": batch["count"] * factor} if "count" in batch else batch for batch in ready]

    def _ready(self, batch: Batch) -> Batch:
        if batch.get("documents") is not None and self.plan.unpackable:
            raise PlanError(f"a packed batch, but {self.plan.unpackable}; turn packing off (data.packing: off)")
        number = batch["input_ids"].numel()
        if self._watching:
            batch = with_documents(batch)
        if self._cuts:
            refuse_undone(self._undone)
        for applied in self.plan.applied:
            if applied.batch is not None:
                batch = applied.batch(batch)
        return batches.to_device(marked(batch, self.plan.tokens(number)) if self._cuts else batch, self.plan.device)

    def loss(self, batch: Batch) -> Tensor:
        """Return this micro-batch's share of the step's loss: its sum over trained tokens / their global number.

        The number counts each token once for every rank that holds it, so that on every mesh the loss of the step is
        the plain sum of all shares (`total`), and its gradient the plain sum of theirs.

        Args:
            batch: From `steps` or `ready`. A loop that counts by itself may pass `labels` and `count`.
        """
        if not (self._watching and torch.is_grad_enabled()):
            return self._sum(batch, self.plan.objective)
        with ExitStack() as stack:
            ends = [stack.enter_context(watch(batch)) for watch in self._watching]
            share = self._sum(batch, self.plan.objective)
            for end in ends:
                share = end(share)
        return share

    @torch.no_grad()
    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Return this micro-batch's shares of what an evaluation reports: `loss`, and what the objective has besides.

        Each is divided as `loss` divides, so that `total` of their sums over a step's micro-batches are means over its
        trained tokens. Of `Distill`: `kl`, `agreement` and `cross_entropy`.

        Args:
            batch: From `steps` or `ready`.

        Example:
            kl = float(run.total(sum(run.scores(batch)["kl"] for batch in micro_batches)))
        """
        objective, names = self.plan.objective, score_names(self.plan.objective)
        if not names:
            return {"loss": self.loss(batch)}
        sums = self._sum(batch, Scores(objective=objective))
        if not isinstance(sums, tuple):  # the micro-batch trains nothing
            sums = (sums,) * (1 + len(names))
        return dict(zip(("loss", *names), sums, strict=True))

    def _sum(self, batch: Batch, objective: Objective) -> Any:
        if self._cuts:
            refuse_unmarked(batch)
        batch = with_targets(batch)  # of a loop that counts by itself
        if "count" not in batch or "targets" not in batch:
            raise PlanError(
                "the batch does not know what its tokens predict and how many tokens its step trains; take batches "
                "from run.steps(loader), or pass them through run.ready"
            )
        with nullcontext(batch) if self._teacher is None else self._teacher.teaching(batch) as taught:
            sums = self.objective_sum(taught, objective)
        count = batch["count"]
        return tuple(one / count for one in sums) if isinstance(sums, tuple) else sums / count

    def objective_sum(self, batch: Batch, objective: Objective) -> Tensor:
        """Return the sum of an objective over the trained positions of this rank's share of a micro-batch.

        Args:
            batch: From `steps` or `ready`, with what the objective needs.
        """
        return self._loss(self.model, batch, objective)

    def total(self, shares: Tensor) -> Tensor:
        """Return the loss of a step over all ranks: the sum of their `shares`. A collective if there are several.

        Args:
            shares: The sum of what `loss` returned for this rank's micro-batches.

        Example:
            reported = float(run.total(sum(loss.detach() for loss in losses)))
        """
        total = shares.detach().clone()
        if self.plan.mesh is not None and self.plan.mesh.size() > 1:
            dist.all_reduce(total)
        return total

    def step(self, optimizer: Optimizer | Sequence[Optimizer], *, clip: float | None = None) -> StepReport:
        """Project, guard, clip, step, retract, and clear the gradients.

        A gradient that is not finite anywhere skips the step on all ranks; `max_skips` in a row end the run.
        """
        self._refuse_attached()
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        named = self.trainable()
        step.check_optimizers(named, optimizers)
        report = step.take(optimizers, named, self.plan.applied, clip)
        self.number += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        if self.skipped_in_a_row >= self.max_skips:
            raise step.too_many_skips(self.skipped_in_a_row, self.number, self._samples, step.non_finite_names(named))
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        return report

    def attach(self, optimizer: Optimizer) -> Callable[[], None]:
        """Project before and retract after each `optimizer.step()` that a loop of your own calls, by hooks.

        Clipping and any guard are the loop's; a clip that runs before this sees the gradient before projection.
        Returns a function that removes the hooks.
        """
        step.check_optimizers(self.trainable(), [optimizer])
        self._refuse_attached()
        self._attached = True
        handles = step.hooks(self.model, self.plan.applied, optimizer)

        def detach() -> None:
            self._attached = False
            for handle in handles:
                handle.remove()

        return detach

    def _refuse_attached(self) -> None:
        if self._attached:
            raise PlanError("the hooks of run.attach() are on an optimizer: each step would be projected twice. Detach")

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the techniques for the present parameters, by name."""
        settle(self.model)
        metrics: dict[str, float] = {}
        for applied in self.plan.applied:
            if applied.metrics is not None:
                metrics |= applied.metrics()
        return metrics

    def finish(self) -> None:
        """Let the techniques write what they have collected; after the last step. A collective."""
        for applied in self.plan.applied:
            if applied.finish is not None:
                applied.finish()

    def undo(self) -> None:
        """Remove forward rewrites and observers: the model computes with its plain modules, as they are now.

        Parameters stay where techniques put them, and so does sharding.
        """
        self._undone = True
        for applied in reversed(self.plan.applied):
            if applied.undo is not None:
                applied.undo()
        for restore in self.plan.restore:
            restore()

    def without(self) -> AbstractContextManager[None]:
        """Open a context in which the model computes, without gradients, as it did before anything was trained.

        For a teacher or a reference model without a second copy. Contexts can be nested. PlanError where a technique
        trains the model's own weights (`full`, `osft` in most forms, a PiSSA start).

        Example:
            with run.without():
                reference = run.model(input_ids=ids).logits
        """
        return self.plan.without()

    def plain(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain weights as the techniques reproduce them now, one at a time; a collective when sharded."""
        return plain(self.plan, names)

    def export(
        self, folder: str | Path, *, adapter: str | None = None, packed: bool = False, experts: Experts = "stacked"
    ) -> Path:
        """Write a dense Hugging Face folder, or that of one named adapter. Every rank calls it; rank 0 writes.

        Args:
            packed: Write quantized weights as codes and scales, as published folders hold them; with `adapter`, that
                is written next to them, into the folder `adapter` inside.
            experts: Of an adapter: `stacked`, as peft has it, or `each`: a pair for each expert, for engines that serve
                unstacked experts.
        """
        return export(self.plan, Path(folder), adapter, packed=packed, experts=experts)
