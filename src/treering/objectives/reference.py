"""The plain truth of distillation: everything in memory at once, in float64, from the definition of each term."""

import torch
from torch import Tensor

from treering.objectives.distill import Distill


def distill(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, how: Distill) -> Tensor:
    """Return Σ over trained tokens of (1 − m) T² Σ_v a_v log(a_v / b_v) + m (−log p_target).

    a, b are the probabilities of teacher and student at temperature T, the other way round if `how` is reverse; p are
    those of the student at temperature 1.
    """
    trained = targets_N != -100
    student, teacher = student_NV[trained].double(), teacher_NV[trained].double().detach()
    b, a = (torch.softmax(z / how.temperature, -1) for z in (student, teacher))
    if how.divergence == "reverse":
        a, b = b, a
    kl = (a * (a / b).log()).sum()
    p = torch.softmax(student, -1)[torch.arange(int(trained.sum())), targets_N[trained]]
    return (1 - how.mix) * how.temperature**2 * kl + how.mix * -p.log().sum()


def scores(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> dict[str, float]:
    """Return the means over trained tokens of KL(teacher ‖ student), of equal first choices, and of cross-entropy."""
    trained = targets_N != -100
    p, q = (torch.softmax(z[trained].double(), -1) for z in (student_NV, teacher_NV))
    chosen = p[torch.arange(int(trained.sum())), targets_N[trained]]
    return {
        "kl": float((q * (q / p).log()).sum(-1).mean()),
        "agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "cross_entropy": float(-chosen.log().mean()),
    }
