"""Weight decay that acts on the change: W − W₀ is drawn towards zero, and never what the model knew.

An optimizer decays W. If decay is a part of the gradient (g + w W: SGD, Adam), w W₀ is taken out of the gradient
before; if it is apart from it (W − lr w W: AdamW, Muon), lr w W₀ is added to the step afterwards. Either way the weight
that the optimizer sees is the weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from treering.core.errors import PlanError

APART = {"AdamW", "Muon", "Adafactor"}
WITHIN = {"SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"}


def decays(
    optimizers: Sequence[Optimizer], weights: Mapping[str, nn.Parameter], *, anchored: bool
) -> dict[str, tuple[float, bool]]:
    """(rate, whether it is apart from the gradient) of each weight that is about to be decayed. Those without a
    gradient are not stepped, and not decayed."""
    names = {id(weight): name for name, weight in weights.items()}
    found: dict[str, tuple[float, bool]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [names[id(p)] for p in group["params"] if id(p) in names and p.grad is not None]
            if not group.get("weight_decay") or not held:
                continue
            if not anchored:
                raise PlanError(
                    f"weight_decay {group['weight_decay']} would draw what the model knew towards zero; set "
                    "osft.keep_initial to true, so that it acts on the change alone, or weight_decay to 0 "
                    "(torch's AdamW decays by 0.01 if nothing is said)",
                    settings=("techniques.osft.keep_initial", "train.optimizer.weight_decay"),
                )
            apart = _apart(optimizer, group)
            rate = float(group["weight_decay"]) * (float(group["lr"]) if apart else 1.0)
            found |= dict.fromkeys(held, (rate, apart))
    return found


def _apart(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    name = type(optimizer).__name__
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    if name not in APART | WITHIN:
        raise PlanError(
            f"how {name} decays weights is not known, so it cannot be made to act on the change alone; set "
            f"weight_decay to 0, or use one of {', '.join(sorted(APART | WITHIN))}"
        )
    return name in APART
