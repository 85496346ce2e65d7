"""The documents with the highest scores of each query, kept while scores arrive block by block."""

import torch
from torch import Tensor


class BestDocuments:
    """The `top` best of the scores added so far. Of equal scores the earlier document is the better one.

    Attributes:
        values: [Q, at most top], highest first.
        documents: [Q, at most top], their numbers.
    """

    def __init__(self, queries: int, top: int):
        self.top = top
        self.values = torch.empty(queries, 0)
        self.documents = torch.empty(queries, 0, dtype=torch.int64)

    def add(self, start: int, scores_nQ: Tensor) -> None:
        """Add the scores of documents `start`, `start` + 1 and so on, after all earlier ones."""
        scores = scores_nQ.mT
        full = self.values.shape[1] == self.top
        better = scores > self.values[:, -1:] if full else torch.ones_like(scores, dtype=torch.bool)
        count = int(better.sum(1).max()) if scores.numel() else 0
        if not count:
            return
        # All better ones are among the `count` largest; in the order of documents, so that the sort keeps it.
        places = torch.where(better, scores, -torch.inf).topk(count, 1).indices.sort(1).values
        values = torch.cat([self.values, scores.gather(1, places)], 1)
        documents = torch.cat([self.documents, places + start], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.values, self.documents = values[:, : self.top], documents.gather(1, order)[:, : self.top]
