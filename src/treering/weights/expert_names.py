"""Under which names a published folder keeps each expert's matrices of a stack, and which rows of the stack they are.

Found by translating the numbers of the rows in place of their values, as an export translates values: gate and up
projections that a model computes as one stack are two matrices of an expert in most folders.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from treering.core.errors import PlanError
from treering.weights.conversion import to_file_layout

if TYPE_CHECKING:
    from torch import Tensor

    from treering.anatomy.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class ExpertMatrix:
    """One matrix of one expert, as a folder names it.

    Attributes:
        module: its name without `.weight`.
        expert: the number of the expert.
        rows: which outputs of the stack's matrix it has, in its order.
    """

    module: str
    expert: int
    rows: "Tensor"


def published_matrices(model: Any, stack: "Matrix") -> tuple[ExpertMatrix, ...]:
    """Return the matrices that a stack is in a published folder, in the order of experts; PlanError if it is a stack
    there as well."""
    (experts,), outputs = stack.lead, stack.outputs
    numbers = torch.arange(experts * outputs).view(experts, outputs, 1)
    translated = to_file_layout(model, {stack.weight: stack.oriented(numbers)})
    if len(translated) < experts or any(not name.endswith(".weight") for name in translated):
        raise PlanError(
            f"{stack.weight}: a published {model.config.model_type} folder keeps its experts as a stack, so an adapter "
            "has no place for each of them; export it without experts: each"
        )
    found = []
    for name, value in translated.items():
        flat = value.flatten()
        found.append(
            ExpertMatrix(module=name.removesuffix(".weight"), expert=int(flat[0]) // outputs, rows=flat % outputs)
        )
    return tuple(sorted(found, key=lambda one: one.expert))
