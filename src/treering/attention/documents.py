"""Where one document ends and the next begins, in one row of packed tokens."""

from collections.abc import Iterable
from dataclasses import FrozenInstanceError, dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from treering.core.errors import DataError


# Frozen by `__setattr__`: torch.compile 2.11 guards the fields of a frozen dataclass that reaches a graph, and would
# compile a block again for each new number of documents.
@dataclass(kw_only=True, eq=False)
class Documents:
    """The lengths of the documents of one packed row, in order, on the host and on the device.

    It travels as the keyword `documents` of the model's forward, so that a recompute in the backward sees it too.
    Compared by identity: two batches never share one.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # int32 [D + 1]: 0, then where each document ends
    longest: int

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Self:
        """Documents of these lengths. The host knows them, so nothing ever waits for the device to tell."""
        lengths = tuple(int(length) for length in lengths)
        if not lengths or min(lengths) < 1:
            raise DataError(f"document lengths are {_shown(lengths)}; give at least one, each at least 1")
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths=lengths, cu_seqlens=ends.to(device, non_blocking=True), longest=max(lengths))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> "Documents":
        """The same documents with `cu_seqlens` on `device`."""
        moved = self.cu_seqlens.to(device, non_blocking=True)
        return self if moved is self.cu_seqlens else Documents.of(self.lengths, device)

    def check(self, tokens: int) -> None:
        """Refuse a row of another length: its tail would attend to nothing, or to another document."""
        if self.tokens != tokens:
            raise DataError(
                f"the documents {_shown(self.lengths)} hold {self.tokens} tokens but the packed row has {tokens}; "
                "their lengths must add up to the row"
            )


def _shown(lengths: tuple[int, ...]) -> str:
    head = ", ".join(map(str, lengths[:8]))
    return f"[{head}]" if len(lengths) <= 8 else f"[{head}, … {len(lengths)} in all]"
