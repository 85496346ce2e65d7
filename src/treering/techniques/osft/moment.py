"""The measured second moment of a weight's inputs, checked against the weight."""

from collections.abc import Mapping

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.techniques.osft.targets import Target


def moment(target: Target, statistics: Mapping[str, Tensor] | None) -> Tensor:
    if statistics is None or "inputs" not in statistics:
        raise PlanError(
            f"osft: the statistics have nothing on the inputs of {target.weight}; measure this model again "
            "(treering measure), leave the weight out of osft.targets, or set osft.protect to weights",
            settings=("statistics.path", "techniques.osft.targets"),
        )
    A = statistics["inputs"]
    wanted = (target.inputs, target.inputs) if target.experts is None else (target.experts,) + (target.inputs,) * 2
    if tuple(A.shape) != wanted:
        raise PlanError(
            f"osft: the statistics hold {tuple(A.shape)} for {target.weight}, whose inputs need {wanted}; "
            "they were measured on another model",
            settings=("statistics.path",),
        )
    if not bool(torch.isfinite(A).all()):
        raise PlanError(f"osft: the statistics of {target.weight} are not finite; measure again in a wider dtype")
    return A
