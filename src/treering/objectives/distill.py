"""Distillation: a run learns to give the probabilities that a teacher gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from treering.core.errors import ConfigError
from treering.objectives.objective import IGNORED, widened

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learn the next-token probabilities of a teacher: (1 − mix) · T² · KL + mix · cross-entropy, for each token.

    teacher      a folder or a hub name, opened as a second, frozen model; `base`: this model before it was trained, its
                 adapters off, which needs no second copy
    temperature  T divides the logits of both before the softmax; above 1, unlikely tokens count for more. The factor T²
                 keeps gradients as large as at 1
    mix          the share of cross-entropy with the labels of the data; 0: the teacher alone
    divergence   `forward`: KL(teacher ‖ student), the student covers all that the teacher finds likely; `reverse`:
                 KL(student ‖ teacher), it avoids what the teacher finds unlikely

    Example:
        run = tr.compose("MODEL", [tr.LoRA(rank=16)], objective=tr.Distill(teacher="TEACHER", temperature=2.0))
    """

    teacher: str
    temperature: float = 1.0
    mix: float = 0.0
    divergence: Literal["forward", "reverse"] = "forward"
    needs: ClassVar[tuple[str, ...]] = ("targets", "teacher_logits")
    copies: ClassVar[int] = 8  # the logits of both, in float32 and divided, log-probabilities, terms of the sum
    scores: ClassVar[tuple[str, ...]] = ("kl", "agreement", "cross_entropy")

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", str(self.teacher))  # of a Path, too
        if not self.teacher.strip():
            raise ConfigError("teacher is empty; name a folder or a hub name, or write base", field="teacher")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be greater than 0 and finite", field="temperature"
            )
        if not 0 <= self.mix < 1:
            raise ConfigError(
                f"mix is {self.mix}; it is the share of cross-entropy, at least 0 and less than 1 (for cross-entropy "
                "alone leave distill out)",
                field="mix",
            )
        if self.divergence not in ("forward", "reverse"):
            raise ConfigError(f"divergence is {self.divergence!r}; write forward or reverse", field="divergence")

    def __call__(self, logits_NV: "Tensor", rows: "Mapping[str, Tensor]") -> "Tensor":
        """Return the sum over rows. A row whose target is -100 adds 0 and has no gradient."""
        from torch.nn import functional as F

        targets_N, teacher_NV = rows["targets"], widened(rows["teacher_logits"])
        p_NV = _log_probabilities(logits_NV, self.temperature)
        q_NV = _log_probabilities(teacher_NV, self.temperature)
        first, second = (q_NV, p_NV) if self.divergence == "forward" else (p_NV, q_NV)
        kl_N = (first.exp() * (first - second)).sum(-1).masked_fill(targets_N == IGNORED, 0.0)
        loss = (1 - self.mix) * self.temperature**2 * kl_N.sum()
        if self.mix:
            loss = loss + self.mix * F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
        return loss

    def score(self, logits_NV: "Tensor", rows: "Mapping[str, Tensor]") -> "tuple[Tensor, ...]":
        """Return sums over rows, all of which are trained: of KL(teacher ‖ student) at temperature 1, of how often both
        find the same token most likely, and of cross-entropy with the labels."""
        from torch.nn import functional as F

        teacher_NV = widened(rows["teacher_logits"])
        p_NV, q_NV = logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
        agree = (logits_NV.argmax(-1) == teacher_NV.argmax(-1)).to(p_NV.dtype)
        return (q_NV.exp() * (q_NV - p_NV)).sum(), agree.sum(), F.nll_loss(p_NV, rows["targets"], reduction="sum")


def _log_probabilities(logits_NV: "Tensor", temperature: float) -> "Tensor":
    return (logits_NV if temperature == 1 else logits_NV / temperature).log_softmax(-1)
