"""What becomes of a run whose checkpoint cannot be written."""

from collections.abc import Sequence

from torch.optim import Optimizer

from treering.core.errors import CheckpointError
from treering.plan import Run
from treering.train.checkpoints.manager import Keeper
from treering.train.reporter import Teller


def save(keeper: Keeper, run: Run, steppers: Sequence[Optimizer], step: int, tell: Teller, final: bool) -> None:
    """Save. With `on_error: warn` a failure on the way is told of, and training goes on; the last one must succeed."""
    strict = keeper.job.train.checkpoint.on_error == "stop"
    try:
        keeper.finish()  # the one before, which may still be written
    except CheckpointError as error:
        if strict:
            raise
        tell.note(f"{error}; training goes on without it")
    try:
        tell.saved(keeper.save(run, steppers, step))
        if final:
            keeper.finish()
    except CheckpointError as error:
        if strict or final:
            raise
        tell.note(f"{error}; training goes on without it")
