"""Micro-batches of one rank, step by step, from any step on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from treering.data.batch import Batch, collate
from treering.data.deal import QUADRATIC, deal
from treering.data.examples import Examples
from treering.data.order import Order

if TYPE_CHECKING:
    import torch


class Loader:
    """Every rank computes the whole step's plan and takes its share, so nothing is communicated."""

    def __init__(
        self,
        examples: Examples,
        order: Order,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: "torch.device | str" = "cpu",
        packing: Literal["on", "off"] = "on",
        quadratic: float = QUADRATIC,
    ):
        self._examples, self.order = examples, order
        self._rank, self._ranks = rank, ranks
        self._device, self._packing, self._quadratic = device, packing, quadratic

    def iter_from(self, step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each global step, from `step` on, through epoch after epoch without end."""
        epoch, within = self.order.locate(step)
        while True:
            for i in range(within, self.order.steps_in_epoch(epoch)):
                yield self.step(epoch, i)
            epoch, within = epoch + 1, 0

    def once(self, epoch: int = 0) -> Iterator[list[Batch]]:
        """The steps of one epoch, for evaluation."""
        for i in range(self.order.steps_in_epoch(epoch)):
            yield self.step(epoch, i)

    def step(self, epoch: int, step: int) -> list[Batch]:
        bins = self.order.bins(epoch, step)
        count = int(sum(self._examples.trained[documents].sum() for documents in bins))
        own = deal(bins, self._examples.lengths, self._ranks, self._quadratic)[self._rank]
        return [
            collate([self._examples.document(i) for i in documents], count, self._device, self._packing)
            for documents in own
        ]

    def position(self, step: int) -> dict[str, int]:
        """Where global step `step` stands, for a checkpoint."""
        epoch, within = self.order.locate(step)
        return {"step": step, "epoch": epoch, "step_in_epoch": within}
