"""The lengths of documents in one row of packed tokens."""

from collections.abc import Iterable
from dataclasses import FrozenInstanceError, dataclass, replace
from itertools import accumulate
from typing import Protocol, Self

import torch
from torch import Tensor

from treering.core.errors import DataError


class Exchange(Protocol):
    """Messages between ranks around the attention of a layer, such as heads in Ulysses; differentiable both ways.

    One exchange serves every layer and every forward, a recompute in the backward included, so it keeps nothing from
    `before` to `after`. B rows (1), H query heads, K key heads, T tokens, D width of query and key, E width of value.
    """

    def before(
        self, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTE: Tensor, sinks_H: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what the attention computes with, for example fewer heads of more tokens, and their sinks."""
        ...

    def after(self, out_BHTE: Tensor) -> Tensor:
        """Return the result for the heads and tokens that `before` was given."""
        ...


# Frozen by `__setattr__`: torch.compile 2.11 guards the fields of a frozen dataclass that reaches a graph, and would
# compile a block again for each new number of documents.
@dataclass(kw_only=True, eq=False)
class Documents:
    """The lengths of the documents of one packed row, in order, on the host and on the device.

    It is passed as the keyword `documents` of the model's forward, so that a recompute in the backward sees it too.
    Compared by identity: two batches never share one.

    Attributes:
        lengths: Tokens of each document.
        cu_seqlens: int32 [D + 1]: 0, then where each document ends.
        longest: The largest of `lengths`.
        exchange: Called around every attention, or None.
        inside: The documents between `before` and `after` of the exchange; None: these.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    longest: int
    exchange: Exchange | None = None
    inside: "Documents | None" = None

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Self:
        """Return documents of these lengths. The host knows them, so nothing ever waits for the device."""
        lengths = tuple(int(length) for length in lengths)
        if not lengths or min(lengths) < 1:
            raise DataError(f"document lengths are {_shown(lengths)}; give at least one, each at least 1")
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths=lengths, cu_seqlens=ends.to(device, non_blocking=True), longest=max(lengths))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def exchanged(self, exchange: Exchange, inside: "Documents | None" = None) -> "Documents":
        """Return the same documents with an exchange, and `inside` it perhaps others."""
        return replace(self, exchange=exchange, inside=inside)

    def to(self, device: torch.device | str) -> "Documents":
        """Return the same documents with `cu_seqlens` on `device`."""
        moved = self.cu_seqlens.to(device, non_blocking=True)
        inside = None if self.inside is None else self.inside.to(device)
        if moved is self.cu_seqlens and inside is self.inside:
            return self
        return replace(self, cu_seqlens=moved, inside=inside)

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
