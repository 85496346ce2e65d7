"""Documents for tests, whole, packed and in padded rows."""

import torch

from tests.zoo import VOCABULARY
from treering.attention import Documents
from treering.core.seeds import generator

LENGTHS = (12, 7, 5, 9)


def documents(lengths=LENGTHS, seed=0):
    return [torch.randint(3, VOCABULARY, (n,), generator=generator(seed, "document", i)) for i, n in enumerate(lengths)]


def rows(given):
    """Right-padded with a token that means something, so that counting it shows."""
    ids = torch.full((len(given), max(map(len, given))), 5)
    mask = torch.zeros_like(ids)
    for i, document in enumerate(given):
        ids[i, : len(document)], mask[i, : len(document)] = document, 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(given):
    positions = torch.cat([torch.arange(len(d)) for d in given])[None]
    return {
        "input_ids": torch.cat(given)[None],
        "position_ids": positions,
        "documents": Documents.of([len(d) for d in given]),
    }


def silent():
    """What a rank without a document is given, so that it takes part."""
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long), "samples": []}
