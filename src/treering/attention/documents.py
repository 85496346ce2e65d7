"""The lengths of documents in one row of packed tokens."""

from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError, dataclass, replace
from itertools import accumulate
from typing import Protocol, Self

import torch
from torch import Tensor

from treering.core.errors import DataError

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # query, key, value and sinks → output


class Exchange(Protocol):
    """Messages between ranks around the attention of a layer, such as heads in Ulysses; differentiable both ways.

    One exchange serves every layer and every forward, a recompute in the backward included, so it keeps nothing.
    B rows (1), H query heads, K key heads, T tokens, D width of query and key, E width of value.
    """

    def around(
        self, attend: Attend, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTE: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """Return the output, B × H × T × E, for the heads and tokens of `query`.

        Args:
            attend: computes attention with what it is given, for example fewer heads of more tokens and their sinks,
                over the documents `inside`.
        """
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
        rows: These are rows of a batch and not packed: what depends on the longest position is that of the batch.
        exchange: Called around every attention, or None.
        inside: The documents of what the exchange attends to; None: these.
        keys_before: Tokens at the beginning of the first document that have keys and no queries.
        queries: Where only some ranges of the row have queries, one range after the other, and keys are of the complete
            row: for each range, which keys it can see, and the documents of these keys. None: all tokens have queries.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    longest: int
    rows: bool = False
    exchange: Exchange | None = None
    inside: "Documents | None" = None
    keys_before: int = 0
    queries: "tuple[tuple[slice, Documents], ...] | None" = None

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

    def as_rows(self) -> "Documents":
        """Return the same documents, and those inside, as what they are: rows of a batch."""
        return replace(self, rows=True, inside=None if self.inside is None else self.inside.as_rows())

    def with_queries(self, queries: Iterable[range]) -> "Documents":
        """Return the same documents, with queries in these ranges of the row only."""
        return replace(self, queries=tuple(self._seen_by(part) for part in queries))

    def _seen_by(self, part: range) -> "tuple[slice, Documents]":
        """Return which keys a range of queries can see, and the documents of these keys, the first perhaps from before
        the range on."""
        stops = list(accumulate(self.lengths))
        inside = [
            (stop - length, min(stop, part.stop))
            for length, stop in zip(self.lengths, stops)
            if stop > part.start and stop - length < part.stop
        ]
        first = inside[0][0]
        seen = Documents.of((stop - start for start, stop in inside), self.cu_seqlens.device)
        return slice(first, part.stop), replace(seen, keys_before=part.start - first)

    def to(self, device: torch.device | str) -> "Documents":
        """Return the same documents with `cu_seqlens` on `device`."""
        moved = self.cu_seqlens.to(device, non_blocking=True)
        inside = None if self.inside is None else self.inside.to(device)
        if moved is self.cu_seqlens and inside is self.inside:
            return self
        queries = None if self.queries is None else tuple((keys, seen.to(device)) for keys, seen in self.queries)
        return replace(self, cu_seqlens=moved, inside=inside, queries=queries)

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
