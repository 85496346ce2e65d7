"""What stays whole between the micro-batches of a step: FSDP's own switches, thrown before each forward.

Which micro-batch is a step's last is told by counting: the plan hands all micro-batches of a step to the techniques
before the first forward. A count that goes wrong is noticed before the optimizer steps. The other way round, a step of
a loop that hands over nothing is summed after each backward, as without `hold`.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from treering.core.errors import PlanError


class Hold:
    """`count` and `check` are what the plan calls; `begin` is a hook of the model."""

    def __init__(self, model: nn.Module, parameters: bool):
        assert isinstance(model, FSDPModule)
        self.model, self.parameters = model, parameters
        self.waiting = 0  # micro-batches handed over and not yet begun
        model.register_forward_pre_hook(self.begin)

    def count(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.waiting += 1
        return batch

    def begin(self, *_: Any) -> None:
        self.waiting = max(0, self.waiting - 1)
        last = self.waiting == 0
        self.model.set_requires_gradient_sync(last)
        if self.parameters:
            self.model.set_reshard_after_backward(last)

    def check(self) -> None:
        """Before a step: gradients that were not summed over ranks yet would be lost, or counted with the next step."""
        if self.waiting:
            raise PlanError(
                f"shard.hold: {self.waiting} micro-batches were taken from run.steps() and did not run before the "
                "step, so gradients have not been summed over ranks. Take the micro-batches of one step, run them "
                "all, and step; or set shard.hold to nothing",
                settings=("shard.hold",),
            )
