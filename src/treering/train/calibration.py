"""Text for a measurement: a sample of documents with a number of tokens, in bins for each rank."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xxhash

from treering.core.errors import DataError
from treering.core.seeds import derive
from treering.core.topology import data_rank
from treering.data.examples import Document, Examples
from treering.data.loader import assign_bins, collate
from treering.data.order import Order, scrambled
from treering.plan import Plan


def sample(examples: Examples, tokens: int, seed: int) -> list[Document]:
    """Return documents with `tokens` tokens, or all there are, in an order that the seed decides; the last one is cut.

    The same for any number of ranks.
    """
    order = np.argsort(scrambled(len(examples), derive(seed, "measure")), kind="stable")
    return first((examples.document(i) for i in order.tolist()), tokens)


def first(documents: Iterable[Document], tokens: int) -> list[Document]:
    """Return the first `tokens` tokens, as documents."""
    selected: list[Document] = []
    for document in documents:
        ids, mask = document.ids[:tokens], document.mask[:tokens]
        selected.append(Document(ids=ids, mask=mask, sample_id=document.sample_id))
        tokens -= len(ids)
        if not tokens:
            break
    return selected


def digest(documents: Sequence[Document]) -> str:
    """Return a digest of the tokens, which does not depend on how they are packed."""
    words = xxhash.xxh3_128()
    for document in documents:
        words.update(len(document.ids).to_bytes(8, "little"))
        words.update(np.ascontiguousarray(document.ids, dtype="<u4").tobytes())
    return words.hexdigest()


def batches(
    documents: Sequence[Document], plan: Plan, capacity: int, packing: Literal["on", "off"]
) -> list[dict[str, Any]]:
    """Return this rank's bins, as many as any other rank's. In rows, `real` is False for padding."""
    lengths = np.asarray([len(document.ids) for document in documents], dtype=np.int32)
    refuse_unknown_tokens(documents, plan)
    order = Order(lengths, seed=0, tokens_per_step=capacity, capacity=capacity, shuffle=False, packing=packing)
    bins = [one for step in range(order.steps_in_epoch(0)) for one in order.bins(0, step)]
    rank, ranks = data_rank(plan.mesh)
    batches_of_rank = []
    for chosen in assign_bins(bins, lengths, ranks)[rank]:
        batch = collate([documents[i] for i in chosen], 0, "cpu", packing)
        if packing == "off":
            lengths_of_rows = torch.tensor([len(documents[i].ids) for i in chosen])
            batch["real"] = torch.arange(batch["input_ids"].shape[1])[None] < lengths_of_rows[:, None]
        batches_of_rank.append(batch)
    return batches_of_rank


def refuse_unknown_tokens(documents: Sequence[Document], plan: Plan) -> None:
    """Raise DataError for a document with a token that the embedding has no row for."""
    rows = plan.model.get_input_embeddings().weight.shape[0]
    for document in documents:
        if (token := int(document.ids.max())) >= rows:
            raise DataError(
                f"{document.sample_id} has token {token}, and the embedding of {plan.source_name} has {rows} rows; use "
                "the tokenizer that the model was trained with"
            )
