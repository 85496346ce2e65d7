"""What each step of a run sees, over all ranks: for figures and reports, which must not be one rank's share."""

from treering.data.examples import Examples
from treering.data.order import Order


class Position:
    """Asked step by step in ascending order, so that it never counts through all epochs again."""

    def __init__(self, examples: Examples, order: Order):
        self.examples, self.order = examples, order
        self.epoch = self.first = 0  # the epoch of the step last asked for, and the step that it begins with

    def documents(self, step: int) -> list[int]:
        while step - self.first >= (steps := self.order.steps_in_epoch(self.epoch)):
            self.epoch, self.first = self.epoch + 1, self.first + steps
        return [i for documents in self.order.bins(self.epoch, step - self.first) for i in documents]

    def tokens(self, step: int) -> int:
        """Of all documents; padding is none."""
        return int(self.examples.lengths[self.documents(step)].sum())

    def samples(self, step: int) -> list[str]:
        return [self.examples.sample_id(i) for i in self.documents(step)]
