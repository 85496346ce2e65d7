"""The parts of a transformers causal language model, by name; every parameter has exactly one role.

    anatomy = examine(model)                    once, from the plain model; the meta device is enough
    select(anatomy, ["q_proj", "*.mlp.*"])      the linear layers that patterns name
    matrices.matrices(anatomy)                  their weights and those of stacked experts, oriented

An anatomy is pure data without a reference to the model. Importing this package does not import torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treering.anatomy.names import matches, select, select_matrices, select_parameters
from treering.anatomy.parts import ROLES, Anatomy, Attention, Block, Experts, Head, Linear, Parameter, Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ROLES",
    "Anatomy",
    "Attention",
    "Block",
    "Experts",
    "Head",
    "Linear",
    "Parameter",
    "Role",
    "examine",
    "matches",
    "select",
    "select_matrices",
    "select_parameters",
]


def examine(model: "PreTrainedModel", overrides: Mapping[str, str] | None = None) -> Anatomy:
    """Return the anatomy of `model`.

    Args:
        model: a transformers causal language model without techniques; on the meta device too.
        overrides: pattern -> role, for parameters whose role the generic rules do not find.

    A parameter without a role, an unreadable attention, an encoder-decoder or a multimodal model is a PlanError.

    Example:
        anatomy = examine(AutoModelForCausalLM.from_pretrained(folder))
        [linear.fqn for linear in anatomy.linears]
    """
    from treering.anatomy.survey import survey

    return survey(model, overrides or {})
