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
        scores = scores_nQ.mT.contiguous()
        if not scores.numel():
            return
        if scores.shape[1] > self.top:
            # What is below the lowest of the best ones of this block is not among the best; equal ones may be.
            least = scores.topk(self.top, 1).values[:, -1:]
        else:
            least = torch.full_like(scores[:, :1], -torch.inf)
        if self.values.shape[1] == self.top:
            least = torch.maximum(least, torch.nextafter(self.values[:, -1:], torch.tensor(torch.inf)))
        chosen = scores >= least
        count = int(chosen.sum(1).max())
        if not count:
            return
        # The chosen ones first, in the order of documents, so that the sort by scores keeps it.
        places = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        found = torch.where(chosen.gather(1, places), scores.gather(1, places), -torch.inf)
        values = torch.cat([self.values, found], 1)
        documents = torch.cat([self.documents, places + start], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.values, self.documents = values[:, : self.top], documents.gather(1, order)[:, : self.top]
