"""What stays complete on each rank between the micro-batches of a step: FSDP's own settings, set before each forward.

The last micro-batch of a step is known by counting: the plan gives all micro-batches of a step to the techniques before
the first forward. A wrong count is an error before the optimizer steps. A loop that does not give its micro-batches to
the plan has its gradients summed after each backward, as without `hold`.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from treering.core.errors import PlanError


class Hold:
    """Counts micro-batches. The plan calls `count` and `check`; `begin` is a hook of the model."""

    def __init__(self, model: nn.Module, parameters: bool):
        assert isinstance(model, FSDPModule)
        self.model, self.parameters = model, parameters
        self.waiting = 0  # micro-batches that were counted and have not begun
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
        """Refuse a step whose gradients are not summed over ranks yet: they would be added to those of the next."""
        if self.waiting:
            raise PlanError(
                f"shard.hold: {self.waiting} micro-batches were taken from run.steps() and did not run before the "
                "step, so gradients have not been summed over ranks. Take the micro-batches of one step, run them "
                "all, and step; or set shard.hold to nothing",
                settings=("shard.hold",),
            )
