"""Micro-batches of one rank, step by step, from any step: bins are assigned to ranks and become tensors."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treering.core.owners import assign
from treering.data.document import Document
from treering.data.order import Order

if TYPE_CHECKING:
    from treering.data.examples import Examples

IGNORED = -100  # the label of a token that is not trained
Batch = dict[str, Any]
# Attention's cost of a document of L tokens is L² times this, in units of one token's other work: about
# 1 / (6 × width) for a model of width 4096. Only the balance depends on it, never a result.
QUADRATIC = 1 / 24_576


class Loader:
    """The micro-batches of one rank. Each rank computes the plan of the full step, so ranks do not communicate."""

    def __init__(
        self,
        examples: "Examples",
        order: Order,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        packing: Literal["on", "off"] = "on",
        quadratic: float = QUADRATIC,
    ):
        self._examples, self.order = examples, order
        self._rank, self._ranks = rank, ranks
        self._device, self._packing, self._quadratic = device, packing, quadratic

    def iter_from(self, step: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each global step, from `step`, through epochs without end."""
        epoch, within = self.order.locate(step)
        while True:
            for i in range(within, self.order.steps_in_epoch(epoch)):
                yield self.step(epoch, i)
            epoch, within = epoch + 1, 0

    def once(self, epoch: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step of one epoch, for evaluation."""
        for i in range(self.order.steps_in_epoch(epoch)):
            yield self.step(epoch, i)

    def step(self, epoch: int, step: int) -> list[Batch]:
        """Return this rank's micro-batches of one step of an epoch."""
        bins = self.order.bins(epoch, step)
        # Of documents that all train nothing (`Examples.only`) the loss is 0, and not 0 / 0.
        count = max(1, int(sum(self._examples.trained[documents].sum() for documents in bins)))
        assigned = assign_bins(bins, self._examples.lengths, self._ranks, self._quadratic)[self._rank]
        return [
            collate([self._examples.document(i) for i in documents], count, self._device, self._packing)
            for documents in assigned
        ]

    def position(self, step: int) -> dict[str, int]:
        """Return the epoch of global step `step` and its index there, for a checkpoint."""
        epoch, within = self.order.locate(step)
        return {"step": step, "epoch": epoch, "step_in_epoch": within}


def cost(documents: Sequence[int], lengths: NDArray[np.int32], quadratic: float = QUADRATIC) -> float:
    """Return Σ L + quadratic · L² over the lengths L of the documents: the cost of a bin in tokens."""
    sizes = np.asarray(lengths)[list(documents)].astype(np.float64)
    return float(sizes.sum() + quadratic * (sizes**2).sum())


def assign_bins(
    bins: Sequence[list[int]], lengths: NDArray[np.int32], ranks: int, quadratic: float = QUADRATIC
) -> list[list[list[int]]]:
    """Return the bins of each rank: the most expensive bin is assigned first, to the rank with the least cost so far.

    All ranks get the same number of bins, because collectives run once a micro-step: empty bins are added. The bins of
    a rank are in descending cost, so that the i-th micro-steps of all ranks cost about the same.
    """
    bins_per_rank = -(-len(bins) // ranks)
    costs = {i: cost(documents, lengths, quadratic) for i, documents in enumerate(bins)}
    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    for i, rank in assign(costs, ranks, most=bins_per_rank).items():
        assigned[rank].append(bins[i])
    return [share + [[] for _ in range(bins_per_rank - len(share))] for share in assigned]


def collate(
    documents: Sequence[Document], count: int, device: torch.device | str, packing: Literal["on", "off"] = "on"
) -> Batch:
    """Return documents as the tensors of one micro-batch; without documents, a batch that trains nothing.

    `count` is the number of trained tokens of the full step.
    """
    rows = [_tensors(document) for document in documents] or [_untrained()]
    if packing == "on":
        ids = torch.cat([row[0] for row in rows])[None]
        labels = torch.cat([row[1] for row in rows])[None]
        positions = torch.cat([torch.arange(len(row[0])) for row in rows])[None]
    else:
        # Padding is on the right: with causal attention no real token attends to it.
        ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORED)
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    batch: Batch = {
        "input_ids": ids.to(device, non_blocking=True),
        "labels": labels.to(device, non_blocking=True),
        "position_ids": positions.to(device, non_blocking=True),
        "count": count,
        "samples": [document.sample_id for document in documents],
    }
    if packing == "on":
        from treering.attention.documents import Documents

        batch["documents"] = Documents.of([len(row[0]) for row in rows], device)
    return batch


def collate_measured(documents: Sequence[Document], packing: Literal["on", "off"]) -> Batch:
    """Return documents as a batch that is measured and trains nothing, on the host; `real` is False for padding and,
    without documents, for all there is."""
    batch = collate(documents, 0, "cpu", packing)
    if packing == "off" or not documents:
        lengths = torch.tensor([len(document.ids) for document in documents] or [0])
        batch["real"] = torch.arange(batch["input_ids"].shape[1])[None] < lengths[:, None]
    return batch


def _tensors(document: Document) -> tuple[Tensor, Tensor]:
    # astype copies: torch must not share the memory of a read-only memory map.
    ids = torch.from_numpy(document.ids.astype("int64"))
    labels = ids.masked_fill(~torch.from_numpy(document.mask.astype("bool")), IGNORED)
    return ids, labels


def _untrained() -> tuple[Tensor, Tensor]:
    """Return two tokens without a label: a rank without a bin has to take part in the step's collectives."""
    return torch.zeros(2, dtype=torch.int64), torch.full((2,), IGNORED)
