"""Host memory that is used again and again, in pieces.

Pinning memory costs milliseconds, so nothing is pinned per block or per step. Lengths change from batch to batch, so
buffers of a block's size would rarely fit the next batch: an input of any size is spread over slabs of one size, and
only its end takes a piece of a power of two. torch's own cache of pinned memory rounds whole buffers up to powers of
two, which would waste up to half of it.
"""

from collections import defaultdict

import torch
from torch import Tensor

from treering.core.errors import PlanError

SLAB = 32 * 2**20
LEAST = 4096


class Pool:
    """Pieces are given back by whoever took them; only `clear` gives memory back to the system."""

    def __init__(self, pinned: bool, slab: int = SLAB):
        self.pinned, self.slab = pinned, slab
        self.held = 0  # bytes, used or waiting
        self.used = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def sizes(self, wanted: int) -> list[int]:
        """Of the pieces that hold `wanted` bytes."""
        whole, rest = divmod(wanted, self.slab)
        return [self.slab] * whole + ([max(LEAST, 1 << (rest - 1).bit_length())] if rest else [])

    def take(self, wanted: int) -> list[Tensor]:
        """One-dimensional tensors of bytes, together at least `wanted` long."""
        pieces = []
        for size in self.sizes(wanted):
            pieces.append(self._free[size].pop() if self._free[size] else self._new(size))
            self.used += size
        return pieces

    def give(self, pieces: list[Tensor]) -> None:
        for piece in pieces:
            self.used -= piece.numel()
            self._free[piece.numel()].append(piece)

    def clear(self) -> None:
        self.held -= sum(piece.numel() for pieces in self._free.values() for piece in pieces)
        self._free.clear()

    def _new(self, size: int) -> Tensor:
        try:
            piece = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        except (RuntimeError, MemoryError) as error:
            raise PlanError(
                f"recompute: {self.held / 2**30:.1f} GiB of host memory hold inputs of blocks, and no more can be had "
                f"({str(error).splitlines()[0]}). Set recompute.budget below that, or offload the first_blocks only",
                settings=("recompute.offload",),
            ) from error
        self.held += size
        return piece
