"""Saving beside training: a copy is staged at once, and written while the loop goes on."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from treering.train.checkpoints import files as checkpoint


class Saver:
    """At most one save is in flight; its error is raised by the next `save` or `wait`, never lost."""

    def __init__(self, asynchronous: bool):
        self.asynchronous = asynchronous
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        # Messages of a save must not mix with those of the training that goes on meanwhile.
        self.group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None

    def save(
        self, root: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], then: Callable[[], None]
    ) -> Path:
        """Every rank calls it. `then` runs once the checkpoint is published."""
        self.wait()
        staged = checkpoint.stage(tensors, copy=self.asynchronous)

        def work() -> None:
            checkpoint.write(root, step, staged, facts, self.group)
            then()

        if not self.asynchronous:
            work()
        else:
            self.thread = threading.Thread(target=self._guard, args=(work,), name=f"save of step {step}", daemon=True)
            self.thread.start()
        return root / f"step-{step}"

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again where somebody hears it
            self.error = error

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
