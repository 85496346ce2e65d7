"""What an objective is, how it gets what it needs at some rows of logits, and cross-entropy.

An objective is a value that the plain head (`plan/batches.py`) and the tiled head (`techniques/tiling/losses.py`) both
evaluate: the first on all rows at once, the second on a tile of rows at a time, with the gradient of each tile.

B sequences, S positions, N trained positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from treering.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the target of a position that is not trained
INPUTS = ("input_ids", "position_ids", "attention_mask", "documents")  # the keys of a batch that a model is called with


class Objective(Protocol):
    """What a run minimizes. Write it as a frozen dataclass.

    Attributes:
        needs: Keys of the batch. Each names a tensor [B, S, …] that is aligned with `targets`: position i holds what
            belongs to the prediction made at position i, which is the next token. `teacher_logits` is not taken from
            the batch where the objective has a `teacher`: its logits are computed, of a tile of rows at a time.
        copies: How many float32 tensors [rows, V] exist at once when the gradient of some rows is computed, the logits
            included. `TiledLoss` computes the length of a tile from it.

    Optional are three more: `teacher`, a folder, a hub name or "base" (see `Distill`); `scores`, names of what an
    evaluation reports besides the loss, with a method `score(logits_NV, rows)` that returns a tuple of sums over rows;
    and `held_out`, the one of `scores` by which held-out documents are compared, where it is not the objective itself.

    Example:
        @dataclass(frozen=True, kw_only=True)
        class WeightedCrossEntropy:
            needs: ClassVar[tuple[str, ...]] = ("targets", "weights")
            copies: ClassVar[int] = 4

            def __call__(self, logits_NV, rows):
                each_N = F.cross_entropy(logits_NV, rows["targets"], reduction="none")
                return (rows["weights"] * each_N).sum()

        run = tr.compose(model, [tr.Full()], objective=WeightedCrossEntropy())
    """

    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def copies(self) -> int: ...
    def __call__(self, logits_NV: "Tensor", rows: "Mapping[str, Tensor]") -> "Tensor":
        """Return the sum over rows, a scalar.

        Args:
            logits_NV: Logits of trained positions, in float32 or wider, scaled and softcapped as the model's own are.
            rows: For each key of `needs`, its values at these positions, [N, …].
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Next-token cross-entropy: Σ (1 − ε)(−log p(target)) + ε · mean over V of −log p, and Σ z_loss · (log Σ exp z)².

    Attributes:
        label_smoothing: ε, the share of the target that is spread evenly over the vocabulary.
        z_loss: The factor of the squared log-sum-exp, which keeps logits small.

    Example:
        run = tr.compose(model, [tr.Full()], objective=CrossEntropy(label_smoothing=0.1))
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    needs: ClassVar[tuple[str, ...]] = ("targets",)
    copies: ClassVar[int] = 4  # the logits, in float32, their softmax, the gradient

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}; it is at least 0 and less than 1", field="label_smoothing"
            )
        if not self.z_loss >= 0:
            raise ConfigError(f"z_loss is {self.z_loss}; it is at least 0", field="z_loss")

    @property
    def scores(self) -> tuple[str, ...]:
        """Cross-entropy alone, where the objective adds to it."""
        return ("cross_entropy",) if self.label_smoothing or self.z_loss else ()

    @property
    def held_out(self) -> str:
        """Held-out documents are compared by cross-entropy alone: what is added to it changes how a model trains."""
        return next(iter(self.scores), "loss")

    def score(self, logits_NV: "Tensor", rows: "Mapping[str, Tensor]") -> "tuple[Tensor, ...]":
        """Return cross-entropy summed over rows, if it is among `scores`."""
        return (CrossEntropy()(logits_NV, rows),) if self.scores else ()

    def __call__(self, logits_NV: "Tensor", rows: "Mapping[str, Tensor]") -> "Tensor":
        """Return the sum over rows. A row whose target is -100 adds 0 and has no gradient."""
        from torch.nn import functional as F

        targets_N = rows["targets"]
        loss = F.cross_entropy(
            logits_NV, targets_N, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            loss = loss + self.z_loss * (logits_NV.logsumexp(-1).square() * (targets_N != IGNORED)).sum()
        return loss


class TeacherStates:
    """What a teacher computed of a batch: its hidden states, and how its logits follow from them.

    The logits of all positions never exist at once where those of the student do not. Neither a mapping nor a
    dataclass, for the reason that `ObjectiveRows` has.
    """

    def __init__(self, hidden_BSH: "Tensor", logits: "Callable[[Tensor], Tensor]"):
        self.hidden_BSH, self.logits = hidden_BSH, logits


class ObjectiveRows:
    """An objective and what it needs at some rows of logits.

    It is passed through the forward of a model and of a head. It is neither a mapping nor a dataclass, because FSDP
    casts every floating tensor that it finds in those: teacher logits and weights would be rounded to bfloat16.
    """

    def __init__(
        self,
        objective: Objective,
        values: "Mapping[str, Tensor]",
        teacher: "Callable[[Tensor], Tensor] | None" = None,
    ):
        self.objective, self.values = objective, values
        self.teacher = teacher  # from `teacher_hidden` among the values to `teacher_logits`

    def select(self, rows: "Callable[[Tensor], Tensor]") -> "ObjectiveRows":
        """Return the same objective with `rows` applied to every value."""
        return ObjectiveRows(self.objective, {key: rows(value) for key, value in self.values.items()}, self.teacher)

    def sum(self, logits_NV: "Tensor") -> "Tensor":
        """Return the sum over all rows."""
        return self.sum_of(logits_NV, self.values)

    def sum_of(self, logits_NV: "Tensor", values: "Mapping[str, Tensor]") -> "Tensor":
        """Return the sum over the rows, all or some of them, that `values` are of."""
        if self.teacher is not None:
            given = dict(values)
            values = {"teacher_logits": self.teacher(given.pop("teacher_hidden")), **given}
        return self.objective(logits_NV, values)


def objective_values(objective: Objective, batch: Mapping[str, Any]) -> ObjectiveRows:
    """Return what `objective` needs at every position of `batch`, [B, S, …]; raise DataError where it is not there."""
    shape = tuple(batch["targets"].shape)
    teacher: TeacherStates | None = batch.get("teacher") if "teacher_logits" in objective.needs else None
    needed = [key for key in objective.needs if teacher is None or key != "teacher_logits"]
    for key in needed:
        if batch.get(key) is None:
            raise DataError(
                f"the objective {objective!r} needs {key!r}, and the batch has {', '.join(map(repr, batch))}; give "
                f"each micro-batch a tensor {key!r} of shape [{shape[0]}, {shape[1]}, …], aligned with its targets"
            )
        if tuple(batch[key].shape[:2]) != shape:
            raise DataError(
                f"the objective {objective!r} needs {key!r} for each of {shape[0]} × {shape[1]} positions, and its "
                f"shape is {list(batch[key].shape)}; position i belongs to the target at position i"
            )
    values = {key: batch[key] for key in needed}
    if teacher is None:
        return ObjectiveRows(objective, values)
    return ObjectiveRows(objective, {**values, "teacher_hidden": teacher.hidden_BSH}, teacher.logits)


def score_names(objective: Objective) -> tuple[str, ...]:
    """Return the names of what an evaluation reports besides the loss."""
    return tuple(getattr(objective, "scores", ()))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """An objective whose value is a tuple of sums: the loss, and each of the numbers that an evaluation reports."""

    objective: Any

    @property
    def needs(self) -> tuple[str, ...]:
        return self.objective.needs

    @property
    def copies(self) -> int:
        return self.objective.copies

    def __call__(self, logits_NV: "Tensor", rows: "Mapping[str, Tensor]") -> Any:
        """Return sums over rows."""
        return (self.objective(logits_NV, rows), *self.objective.score(logits_NV, rows))


def widened(logits: "Tensor") -> "Tensor":
    """Return `logits` in float32, or in their own dtype if it is wider: what objectives are evaluated on."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))
