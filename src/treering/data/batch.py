"""A bin of documents as the tensors of one micro-batch."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from treering.data.examples import Document

IGNORED = -100  # the label of a token that is not trained
Batch = dict[str, Any]


def collate(
    documents: Sequence[Document], count: int, device: torch.device | str, packing: Literal["on", "off"] = "on"
) -> Batch:
    """`count` is the number of trained tokens of the whole step. No documents: a batch that trains nothing."""
    rows = [_tensors(document) for document in documents] or [_nothing()]
    if packing == "on":
        ids = torch.cat([row[0] for row in rows])[None]
        labels = torch.cat([row[1] for row in rows])[None]
        positions = torch.cat([torch.arange(len(row[0])) for row in rows])[None]
    else:
        # Padding stands to the right, where causal attention never lets a real token see it.
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


def _tensors(document: Document) -> tuple[Tensor, Tensor]:
    # Copied by astype: torch must not alias a read-only memory map.
    ids = torch.from_numpy(document.ids.astype("int64"))
    labels = ids.masked_fill(~torch.from_numpy(document.mask.astype("bool")), IGNORED)
    return ids, labels


def _nothing() -> tuple[Tensor, Tensor]:
    """Two tokens without a label: a rank without a bin still has to take part in the step's collectives."""
    return torch.zeros(2, dtype=torch.int64), torch.full((2,), IGNORED)
