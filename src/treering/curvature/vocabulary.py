"""What is covered, and the sides of head and embedding that are as wide as the vocabulary.

V vocabulary, p numbers that are kept of it, R [p, V] a random projection (core/projection.py), a function of the name.
The second moment of such a side would be V × V, 92 GB at 151,000 tokens, so it is projected before anything is summed:

    head       g ← R g
    embedding  a = e_v, token v  ←  R D^(−½) e_v,  D = (n_v + 0.1 n̄) / n̄,  n_v how often v was measured, n̄ their mean

e_v are one-hot, so that their second moment is diagonal: D whitens it exactly, before the projection. Without counts
(nothing was measured) D is 1. A vocabulary of no more than p tokens is not projected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from treering.core.full_precision import full_precision
from treering.core.projection import Side, projection

Cover = Literal["blocks", "all"]
VOCABULARY = 256  # numbers that are kept of a side as wide as the vocabulary
DAMPING = 0.1  # of counts of tokens, in units of their mean


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of which parameters gradients are seen.

    Attributes:
        of: matrices inside the `blocks`, or `all`: biases, norms, routers, embedding and head as well.
        vocabulary: numbers that are kept of a side as wide as the vocabulary.
        counts: embedding → how often each token was measured, [V].
    """

    of: Cover = "blocks"
    vocabulary: int = VOCABULARY
    counts: Mapping[str, Tensor] = field(default_factory=dict)


BLOCKS = Coverage()


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularySide:
    """One side of a matrix, `size` wide, of which `kept` numbers are kept."""

    name: str
    side: Side
    size: int
    kept: int
    counts: Tensor | None = None

    @cached_property
    def table_VP(self) -> Tensor:
        """(R D^(−½))ᵀ, float32, made when it is first used."""
        if self.kept < self.size:
            R = projection(0, f"the vocabulary of {self.name}", self.side, self.kept, self.size)
        else:
            R = torch.eye(self.size)
        if self.counts is not None:
            counts = self.counts.double()
            D = (counts + DAMPING * counts.mean()) / counts.mean()
            R = (R * D.rsqrt()).float()
        return R.mT.contiguous()

    def rows_of(self, g_RV: Tensor) -> Tensor:
        """Return R g of each row."""
        wide = g_RV.to(torch.promote_types(g_RV.dtype, torch.float32))
        with full_precision():
            return wide @ self._on(g_RV.device).to(wide.dtype)

    def columns_of(self, tokens_R1: Tensor) -> Tensor:
        """Return R D^(−½) e_v of each row, which is a token."""
        return self._on(tokens_R1.device)[tokens_R1[:, 0]]

    def _on(self, device: torch.device) -> Tensor:
        if self.table_VP.device != device:
            self.__dict__["table_VP"] = self.table_VP.to(device)
        return self.table_VP
