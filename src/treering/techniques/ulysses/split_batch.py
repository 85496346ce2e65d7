"""This rank's share of a micro-batch: every tensor with an element for each token is cut by the same ranges.

Rows of a batch become one packed row, each of them a document. Positions stay those in the document; labels have become
targets before, so that no token loses the one that it predicts.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from treering.attention import Documents
from treering.core.errors import DataError, PlanError
from treering.core.module_forward import ModuleForward
from treering.objectives import IGNORED
from treering.techniques.ulysses.ranks import SequenceRanks

Batch = dict[str, Any]


class OnlyShares(ModuleForward):
    """Refuse gradients of a batch that was not cut: each rank would compute all of it, and its gradients be added up.

    Without gradients, in evaluation or generation, a complete batch is computed on each rank.
    """

    def __call__(self, *args: Any, documents: Documents | None = None, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (documents is None or documents.exchange is None):
            raise PlanError(
                "ulysses: the model was given a batch that is not cut for the ranks which share its rows, so its "
                "gradient would be counted once for each of them. Take batches from run.steps(loader), or pass them "
                "through run.ready; without gradients (torch.no_grad) complete batches are allowed",
                settings=("ulysses",),
            )
        return self.call_former(*args, **({} if documents is None else {"documents": documents}), **kwargs)


def split_batch(batch: Batch, ranks: SequenceRanks) -> Batch:
    """Return the share of this rank of `batch`, [B, S], as one row with the exchange in its documents.

    `labels` are left out: a loss that shifts them inside a share would lose a target at each border.
    """
    rows, length = batch["input_ids"].shape
    packed = batch.get("documents") is not None
    lengths = _lengths(batch, rows, length)
    batch = {**batch, "position_ids": _positions(batch, rows, length)}
    tokens = rows * length
    padding = ranks.grid.padded(tokens) - tokens
    if padding:
        lengths = (*lengths, padding)
    share = {}
    for name, value in batch.items():
        if name not in ("labels", "attention_mask", "documents"):
            flat = _flat(value, rows, length, IGNORED if name == "targets" else 0, padding)
            share[name] = _cut(flat, tokens + padding, ranks.tokens(tokens))
    documents = ranks.documents(lengths, batch["input_ids"].device, _last(batch["position_ids"]))
    return {**share, "documents": documents if packed else documents.as_rows()}


def _lengths(batch: Batch, rows: int, length: int) -> tuple[int, ...]:
    """Return the lengths of the documents of all rows, one after the other."""
    documents: Documents | None = batch.get("documents")
    mask: Tensor | None = batch.get("attention_mask")
    if documents is not None:
        if rows != 1:
            raise DataError(f"a batch has documents and {rows} rows; packed tokens are one row, [1, T]")
        documents.check(length)
        if mask is not None:
            raise DataError("a batch has documents and an attention_mask; packed rows have no padding: leave it out")
        return documents.lengths
    if mask is None:
        return (length,) * rows
    if mask.shape != (rows, length):
        raise DataError(
            f"attention_mask is {tuple(mask.shape)} and input_ids {(rows, length)}; ranks of the mesh's `sequence` "
            "axis share a row by documents, so a mask may only separate padding from tokens: [B, S]"
        )
    return tuple(size for row, real in enumerate((mask != 0).cpu()) for size in _runs(batch, row, real))


def _runs(batch: Batch, row: int, real: Tensor) -> list[int]:
    """Return the lengths of padding, text and padding of one row: padding is a document that trains nothing."""
    borders = (real[1:] != real[:-1]).nonzero().flatten() + 1
    stops = [*borders.tolist(), len(real)]
    lengths = [stop - start for start, stop in zip([0, *stops], stops)]
    if not real[0] and real.any() and batch.get("position_ids") is None:
        raise DataError(
            f"row {row} is padded on the left and the batch has no position_ids: models differ in whether positions "
            "begin at the padding or at the first token. Pad on the right, or give position_ids"
        )
    texts = len(lengths) - (0 if real[0] else 1)  # runs from the first token on
    if texts > 2:
        raise DataError(
            f"attention_mask of row {row} has a gap between tokens; ranks of the mesh's `sequence` axis share a row "
            "by documents. Put padding at an end of the row, or pack documents"
        )
    if "targets" in batch:
        wrong = int((batch["targets"][row].cpu()[~real] != IGNORED).sum())
        if wrong:
            raise DataError(
                f"row {row} trains {wrong} tokens that attention_mask takes for padding, or the first one after it; "
                f"set their labels to {IGNORED}"
            )
    return lengths


def _flat(value: Any, rows: int, length: int, fill: int, padding: int) -> Any:
    """Return a tensor [B, S, …] or [K, B, S] as [1, B·S, …] or [K, 1, B·S], with padding; all else as it is."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if value.shape[:2] == (rows, length):
        one = value.flatten(0, 1)[None]
        return F.pad(one, (*(0, 0) * (one.ndim - 2), 0, padding), value=fill) if padding else one
    if value.ndim == 3 and value.shape[1:] == (rows, length):
        one = value.flatten(1)[:, None]
        return F.pad(one, (0, padding), value=fill) if padding else one
    return value


def _positions(batch: Batch, rows: int, length: int) -> Tensor:
    """Return the positions, [B, S] or [K, B, S]: without any 0 to S − 1 in each row, as transformers has them."""
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=batch["input_ids"].device)[None]
    return positions.expand(*positions.shape[:-2], rows, length)


def _last(position_ids: Tensor) -> int:
    """Return the largest position; 0 where memory is planned, from shapes alone."""
    return 0 if isinstance(position_ids, FakeTensor) else int(position_ids.max())


def _cut(value: Any, tokens: int, own: tuple[range, ...]) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    axis = 1 if value.shape[:2] == (1, tokens) else 2 if value.ndim == 3 and value.shape[1:] == (1, tokens) else None
    if axis is None:
        return value
    parts = [value.narrow(axis, part.start, len(part)) for part in own]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, axis)
