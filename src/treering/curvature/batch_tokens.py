"""Which document each token of a batch is of, and which tokens the rows are that reach a layer.

Rows reach a layer in one of three ways: all tokens in their order, the tokens that a loss is taken at (the head), or
a tile of either. Experts get rows that are sorted by expert, whose tokens the routing knows.

T tokens of this rank's batch, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from treering.core.errors import PlanError
from treering.objectives import IGNORED
from treering.technique import TileRows

NUMBERS = "document_numbers"  # the batch's key: [B, S], which document each token is of; -1: none, padding


class Segment(NamedTuple):
    """Consecutive rows of one document, and of one expert where there are several."""

    document: int
    expert: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRows:
    """The rows of one call of a layer.

    Attributes:
        documents_R: which document each is of, on the host; -1: it counts for nothing.
        places_R: which token of the batch each is, on the host.
        complete: no other call of this backward has rows for the layer: these were all, or the last tile.
        key: equal for equal rows of one batch, so that what is computed from them is computed once.
    """

    documents_R: Tensor
    places_R: Tensor
    complete: bool
    key: Any


class BatchTokens:
    """The tokens of this rank's share of a batch.

    Args:
        numbers_BS: which document each token is of, from 0; -1: it counts for nothing.
        targets_BS: what each token predicts, -100 where no loss is taken.
        names: of the documents.
    """

    def __init__(self, numbers_BS: Tensor, targets_BS: Tensor, names: Sequence[str] = ()):
        rows, length = targets_BS.shape
        self.names = tuple(names)
        self.documents_T = numbers_BS.reshape(-1).cpu()
        trained = (targets_BS != IGNORED).cpu()
        kept = trained.any(0).nonzero().squeeze(1)
        if not len(kept):  # the head is called with one position, whose loss is 0
            kept = torch.zeros(1, dtype=torch.long)
        self.orders: dict[int, Tensor | None] = {
            rows * length: None,
            rows * len(kept): (torch.arange(rows)[:, None] * length + kept).reshape(-1),
            int(trained.sum()): trained.reshape(-1).nonzero().squeeze(1),
        }
        if rows * length in (rows * len(kept), int(trained.sum())):
            self.orders[rows * length] = None  # the same tokens in the same order
        self._rows: dict[Any, LayerRows] = {}
        self._cached: dict[Any, Any] = {}

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "BatchTokens":
        """Return the tokens of a batch that a run has made ready, which has `targets` and `document_numbers`."""
        return cls(batch[NUMBERS], batch["targets"], batch.get("samples", ()))

    def has_order(self, count: int) -> bool:
        """Return whether a layer that is called with `count` rows may have one for each token."""
        return count in self.orders

    def rows(self, name: str, count: int, tile: TileRows | None) -> LayerRows:
        """Return the rows of a layer that is called with `count` of them."""
        total = count if tile is None else tile.total
        if total not in self.orders or (tile is not None and tile.stop - tile.start != count):
            raise PlanError(
                f"{name} is called with {total} rows for a batch of {len(self.documents_T)} tokens, so of which "
                "documents they are is not known; leave this weight out"
            )
        start, stop = (0, total) if tile is None else (tile.start, tile.stop)
        key = total, start, stop
        if key not in self._rows:  # all layers have the same rows
            order = self.orders[total]
            places = torch.arange(start, stop) if order is None else order[start:stop]
            documents = self.documents_T[places]
            self._rows[key] = LayerRows(documents_R=documents, places_R=places, complete=stop == total, key=key)
        return self._rows[key]

    def routed(self, name: str, tokens_R: Tensor, count: int, tile: TileRows | None) -> LayerRows:
        """Return the rows of experts that are called with `count` tokens, of which `tokens_R` are the rows' ones."""
        among = self.rows(name, count, tile)
        chosen = tokens_R.cpu()
        return LayerRows(
            documents_R=among.documents_R[chosen], places_R=among.places_R[chosen], complete=among.complete, key=None
        )

    def segments(self, rows: LayerRows, experts_R: Tensor | None = None) -> list[Segment]:
        """Return the runs of rows of one document (and expert), without those that count for nothing."""
        if rows.key is not None and experts_R is None and rows.key in self._cached:
            return self._cached[rows.key]
        if experts_R is None:
            documents, counts = torch.unique_consecutive(rows.documents_R, return_counts=True)
            values = torch.stack([documents, torch.zeros_like(documents)])
        else:
            both = torch.stack([rows.documents_R, experts_R.cpu()])
            values, counts = torch.unique_consecutive(both, dim=1, return_counts=True)
        stops = counts.cumsum(0).tolist()
        found = [
            Segment(document, expert, stop - count, stop)
            for document, expert, count, stop in zip(*values.tolist(), counts.tolist(), stops)
            if document >= 0
        ]
        if rows.key is not None and experts_R is None:
            self._cached[rows.key] = found
        return found


def numbers_of(batch: dict[str, Any], real_BS: Tensor | None) -> Tensor:
    """Return the document of each token of a complete batch, [B, S]: of packed documents their place in the row, else
    the row; -1 where `real_BS` is not true."""
    ids, documents = batch["input_ids"], batch.get("documents")
    if documents is not None:
        lengths = torch.tensor(documents.lengths)
        numbers = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    else:
        numbers = torch.arange(ids.shape[0])[:, None].expand(ids.shape)
    return numbers.clone() if real_BS is None else numbers.masked_fill(real_BS.cpu() == 0, -1)


def with_documents(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a complete batch with the document of each token, and `samples`: its own or, without, names that are made
    of the documents' tokens."""
    if isinstance(batch["input_ids"], FakeTensor) or batch["input_ids"].is_meta:  # memory is planned from shapes alone
        return batch
    numbers = numbers_of(batch, batch.get("attention_mask"))
    if "samples" in batch:
        return {**batch, NUMBERS: numbers}
    ids, flat = batch["input_ids"].reshape(-1).cpu(), numbers.reshape(-1)
    each = (ids[flat == number].numpy().astype("<i8").tobytes() for number in range(int(flat.max()) + 1))
    return {**batch, NUMBERS: numbers, "samples": [f"tokens:{xxhash.xxh3_64_hexdigest(content)}" for content in each]}
