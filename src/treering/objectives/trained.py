"""Which positions of a micro-batch are trained, found once.

Their number decides shapes, so whoever asks a device for it waits until everything before has been computed. It is
asked for where the targets are on the host still, before they are sent to the device: then nothing waits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treering.objectives.objective import IGNORED

TRAINED = "trained"  # the key of a batch's `TrainedPositions`


class TrainedPositions:
    """The trained positions of targets [B, S]: K of them in any row, N in all.

    Not a dataclass, for the reason that `ObjectiveRows` has.

    Attributes:
        targets_BS: The targets that they are of: a batch with others has others.
        number: N.
        index_N: Their numbers, row after row; None where they are all positions but the last of each row.
        columns_K: Positions that are trained in any row.
        kept_N: Which of the B × K positions there are trained, row after row; None: all.
    """

    def __init__(
        self, targets_BS: Tensor, number: int, index_N: Tensor | None, columns_K: Tensor, kept_N: Tensor | None
    ):
        self.targets_BS, self.number = targets_BS, number
        self.index_N, self.columns_K, self.kept_N = index_N, columns_K, kept_N

    def rows(self, x_BS: Tensor) -> Tensor:
        """Return the values of x [B, S, …] at trained positions, [N, …]."""
        if self.index_N is None:
            return x_BS[:, :-1].reshape(-1, *x_BS.shape[2:])
        return x_BS.reshape(-1, *x_BS.shape[2:])[self.index_N]

    def of(self, targets_BS: Tensor) -> "TrainedPositions":
        """Return the same positions on the device of `targets_BS`, which are the same targets."""
        moved = (x if x is None else sent_to(x, targets_BS.device) for x in (self.index_N, self.kept_N))
        index_N, kept_N = moved
        return TrainedPositions(targets_BS, self.number, index_N, sent_to(self.columns_K, targets_BS.device), kept_N)


def find_trained(targets_BS: Tensor) -> TrainedPositions:
    """Return the trained positions; waits for the device of the targets."""
    trained_BS = targets_BS != IGNORED
    index_N = trained_BS.reshape(-1).nonzero().squeeze(1)
    columns_K, kept_N = index_N, None  # of a single row
    if len(targets_BS) > 1:
        columns_K = trained_BS.any(0).nonzero().squeeze(1)
        kept_N = trained_BS[:, columns_K].flatten().nonzero().squeeze(1)
    number, before_last = index_N.numel(), trained_BS[:, :-1]
    every = number == before_last.numel() and bool(before_last.all())
    return TrainedPositions(targets_BS, number, None if every else index_N, columns_K, kept_N)


def with_trained(batch: dict[str, Any], sent: dict[str, Any]) -> dict[str, Any]:
    """Return `sent`, the batch on its device, with its trained positions, which are found in `batch`."""
    if "targets" not in batch:
        return sent
    return {**sent, TRAINED: find_trained(batch["targets"]).of(sent["targets"])}


def trained_positions(batch: Mapping[str, Any]) -> TrainedPositions:
    """Return the trained positions of a batch: those found before, if they are of these targets."""
    found: TrainedPositions | None = batch.get(TRAINED)
    return found if found is not None and found.targets_BS is batch["targets"] else find_trained(batch["targets"])


def sent_to(x: Tensor, device: torch.device) -> Tensor:
    """Return x on a device. The host waits only for a copy to pinned memory, not for what the device computes."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
