"""A model that is measured: how a batch is put through it, which tokens count, and over which ranks sums run."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treering.anatomy import examine
from treering.core.collectives import gather_objects
from treering.core.errors import DataError, PlanError
from treering.core.sharded import settle
from treering.core.topology import AXES, axis_size
from treering.curvature import labels
from treering.curvature.batch_tokens import NUMBERS, BatchTokens, numbers_of
from treering.curvature.factors import Labels
from treering.curvature.observer import Observer
from treering.curvature.pairs import Capture
from treering.curvature.sums import reduced
from treering.objectives import CrossEntropy, Objective
from treering.objectives.plain_loss import plain_loss
from treering.technique import Maps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy

_INPUTS = ("input_ids", "position_ids", "attention_mask", "documents")
Batch = dict[str, Any]

MaskedBatches = Sequence[tuple[Batch, Tensor | None]]  # with the tokens that count, [B, S]; None: all


class Composed(Protocol):
    """A `treering.Run`."""

    model: Any
    plan: Any

    def ready(self, micro_batches: Sequence[Batch]) -> list[Batch]: ...
    def objective_sum(self, batch: Batch, objective: Objective) -> Tensor: ...


class MeasuredModel:
    """The model that is measured, and how to get a batch into it."""

    def __init__(self, model: nn.Module, anatomy: "Anatomy", mesh: "DeviceMesh | None", run: Composed | None):
        self.model, self.anatomy, self.run = model, anatomy, run
        self.mesh = mesh
        self.groups = self.data_groups = _groups(mesh, ("replicate", "shard"))
        self.maps: Maps | None = None if run is None else run.plan.maps()  # None: nothing trains
        self.shared = axis_size(mesh, "sequence")  # ranks that are given the same batches
        self.device = run.plan.device if run is not None else next(model.parameters()).device
        self.short = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.short["logits_to_keep"] = 1  # type: ignore[assignment]  # the logits are not used

    @classmethod
    def of(cls, model: "nn.Module | Composed", anatomy: "Anatomy | None", mesh: "DeviceMesh | None") -> "MeasuredModel":
        """Return a live model or a composed run as what is measured."""
        if isinstance(model, nn.Module):
            return cls(model, anatomy or examine(model), mesh, None)  # type: ignore[arg-type]
        return cls(model.model, anatomy or model.plan.anatomy, mesh or model.plan.mesh, model)

    def agree(self, given: int, seen: int) -> None:
        """Let sums run over all ranks among which different tokens lie. A collective where ranks share batches.

        Args:
            given: Tokens of this rank's batches that are to be counted.
            seen: Tokens that this rank's model has counted: fewer where a technique cuts rows.
        """
        if self.shared == 1:
            return
        every = _groups(self.mesh, AXES)
        total = int(reduced(torch.tensor(given, device=self.device), self.groups))
        counted = int(reduced(torch.tensor(seen, device=self.device), every))
        if counted == total:
            self.groups = every
        elif counted != total * self.shared:
            raise PlanError(
                f"the batches have {total} tokens to be measured, and the {self.shared} ranks that share each batch "
                f"have seen {counted} together; a technique that cuts rows must leave each token (and its place in "
                "`real`) on one of these ranks, one that does not must leave it on all of them"
            )

    def forward(self, seen: Observer, batch: Batch, real: Tensor | None) -> None:
        """Put a batch through the model; `seen` counts the tokens that are `real`, [B, S]."""
        if self.run is not None:
            if real is None and self.shared > 1:  # a technique that cuts rows may pad them, too
                real = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
            [batch] = self.run.ready([batch if real is None else {**batch, "real": real}])
            real = batch.get("real")
        inputs = {n: batch[n] for n in _INPUTS if batch.get(n) is not None}
        inputs = {n: v.to(self.device) if hasattr(v, "to") else v for n, v in inputs.items()}
        with seen.counting(real):
            self.model(**inputs, **self.short)

    def backward(self, seen: Capture, batch: Batch, real: Tensor | None, kind: Labels, seed: int) -> tuple[Tensor, int]:
        """Run forward and backward over a batch, for the gradients that `seen` sees.

        The loss is the sum over tokens, of labels of the data or drawn ones. Parameters get no gradient.

        Returns:
            The document of each token of the complete batch, [B, S], -1 for those that have no gradient: padding, and
            what follows the last label of a document. And how many tokens with one this rank has computed.
        """
        numbers, batch = _numbered(batch, real)
        objective: Objective = CrossEntropy()
        if kind == "sampled":
            objective = labels.SampledLabels()
            batch = {**batch, labels.DRAWS: labels.draws(batch, numbers, seed)}
        batch = {**batch, NUMBERS: numbers}
        if self.run is not None:
            [batch] = self.run.ready([batch])
        batch = {name: value.to(self.device) if hasattr(value, "to") else value for name, value in batch.items()}
        seen.batch = tokens = BatchTokens.of(batch)
        with torch.enable_grad():
            if self.run is None:
                loss = plain_loss(self.model, batch, objective)
            else:
                loss = self.run.objective_sum(batch, objective)
            loss.backward()
        seen.batch = None
        for parameter in self.model.parameters():
            parameter.grad = None
        return numbers, int((tokens.documents_T >= 0).sum())

    def token_counts(self, batches: MaskedBatches, vocabulary: int) -> Tensor:
        """Return how often each token has a gradient in the batches of all ranks, [vocabulary]. A collective."""
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for batch, real in batches:
            numbers, _ = _numbered(batch, real)
            counts += torch.bincount(batch["input_ids"].cpu()[numbers >= 0], minlength=vocabulary)
        return reduced(counts.to(self.device), self.data_groups).cpu()


def _numbered(batch: Batch, real: Tensor | None) -> tuple[Tensor, Batch]:
    """Return the document of each token that has a gradient, [B, S], else -1, and the batch with its targets."""
    numbers = numbers_of(batch, real)
    batch = labels.with_targets(batch, numbers)
    return labels.with_gradient(numbers, batch["targets"]), batch


def agreed(owners: dict[str, str]) -> dict[str, str]:
    """Return `owners`, or raise a PlanError unless all ranks have the same in the same order: other sums would be added
    up. A collective."""
    everyone = gather_objects(owners)
    for rank, other in enumerate(everyone):
        if list(other.items()) != list(everyone[0].items()):
            raise PlanError(
                f"rank {rank} observed other linears than rank 0, or others that share their inputs ({len(other)} "
                f"and {len(everyone[0])} weights); the model does not compute the same on all ranks and "
                "cannot be measured"
            )
    return owners


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off inside the context, and restore the mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        settle(model)  # FSDP frees gathered parameters in a backward, which did not run


def real_tokens(batch: Batch, tokens: Literal["real", "trained"]) -> Tensor | None:
    """Return which tokens of a batch count, [B, S]; None: all."""
    ids = batch["input_ids"]
    if "samples" in batch and not batch["samples"]:  # padding for a rank that has no document of its own
        return torch.zeros(ids.shape, dtype=torch.bool)
    real = batch.get("real", batch.get("attention_mask"))
    if real is None and ids.shape[0] > 1 and batch.get("documents") is None:
        raise DataError(
            f"a batch of {ids.shape[0]} rows does not separate padding from tokens; give it `real` or "
            "`attention_mask`, [B, S], or measure packed rows"
        )
    if tokens == "real":
        return real
    if "targets" in batch:
        predicts = batch["targets"].cpu() != -100
    else:  # a batch that no run has made ready
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        predicts[:, :-1] = batch["labels"][:, 1:] != -100
    return predicts if real is None else predicts & (real.cpu() != 0)


def _groups(mesh: "DeviceMesh | None", axes: Sequence[str]) -> "list[ProcessGroup]":
    """Return the groups of `axes`; without a mesh that has them, one of all ranks."""
    if mesh is not None and set(axes) <= set(mesh.mesh_dim_names or ()):
        return [mesh[axis].get_group() for axis in axes if mesh[axis].size() > 1]
    if dist.is_initialized() and dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        return [dist.group.WORLD]
    return []
