"""The terms of the sums that make up a preconditioner, from the pairs that a backward gives.

T tokens, a_t inputs, g_t output gradients, G_n = Σ_t g_t a_tᵀ the gradient of document n, N documents:

    kfac      A = Σ_t a_t a_tᵀ              S = Σ_t g_t g_tᵀ
    ekfac     the same, and Λ = Σ_n (Q_Sᵀ G_n Q_A)² once their eigenvectors are known
    shampoo   A = Σ_n G_nᵀ G_n              S = Σ_n G_n G_nᵀ
    tkfac     A = Σ_t ‖g_t‖² a_t a_tᵀ       S = Σ_t ‖a_t‖² g_t g_tᵀ

Per document and per token, never per batch: what a batch has besides would change the sums. With shampoo and tkfac the
plain `moment` Σ_t a_t a_tᵀ is summed as well, for whoever needs the inputs alone.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.curvature.batch_tokens import Segment
from treering.curvature.exact_sums import ExactSum
from treering.curvature.factors import Kind
from treering.curvature.observer import same_memory
from treering.curvature.pairs import Pair

Term = Literal["moment", "inputs", "gradients", "corrected", "cross", "trace"]
Sums = Mapping[tuple[str, Term], ExactSum]


class DocumentGradients:
    """The gradient of each document and expert, from pairs whose rows may be those of a tile.

    Of the rows of a tile, a document that continues in the next tile is carried over.
    """

    def __init__(self) -> None:
        self._carried: dict[str, dict[tuple[int, int], Tensor]] = {}

    def of(self, pair: Pair, a_RM: Tensor, g_RN: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """Yield (segment, G) of the documents that are complete; a_RM and g_RN are the pair's, perhaps rotated."""
        carried = self._carried.setdefault(pair.weight, {})
        continues = -1 if pair.rows.complete else int(pair.rows.documents_R[-1])
        if pair.experts is not None and not pair.rows.complete:
            continues = int(pair.rows.documents_R.max())
        for segment in pair.batch.segments(pair.rows, pair.experts):
            rows, key = slice(segment.start, segment.stop), (segment.document, segment.expert)
            gradient = g_RN[rows].mT @ a_RM[rows]
            if key in carried:
                gradient += carried.pop(key)
            if segment.document == continues:
                carried[key] = gradient
            else:
                yield segment, gradient
        if pair.rows.complete:
            for (document, expert), gradient in self._carried.pop(pair.weight).items():
                yield Segment(document, expert, 0, 0), gradient


class FactorTerms:
    """Adds the terms of A and S.

    Args:
        kind: which terms.
        pooled: all experts of a stack have one sum.
        sums: by weight and term. A weight without a sum has the same inputs as another one.
        shared: is told of all inputs, to find out which weights have the same.
    """

    def __init__(self, kind: Kind, pooled: bool, sums: Sums, shared: "SharedInputs | None" = None):
        self.kind, self.pooled, self.sums, self.shared = kind, pooled, sums, shared
        self._documents = DocumentGradients()

    def take(self, pair: Pair) -> None:
        """Add what a pair gives."""
        if self.shared is not None:
            self.shared.see(pair.weight, pair.a_RM if pair.source_RM is None else pair.source_RM)
        a, g = _wide(pair.a_RM), _wide(pair.g_RN)
        if self.kind == "shampoo":
            self._shampoo(pair, a, g)
        for expert, rows in self._counted(pair):
            a_e, g_e = a[rows], g[rows]
            if (pair.weight, "moment") in self.sums:
                plain = a_e[:, : self.sums[pair.weight, "moment"].total.shape[-1]]  # without the 1 of a bias
                self._add(pair, "moment", expert, plain.mT @ plain, len(a_e))
            if self.kind == "shampoo":
                continue
            if self.kind == "tkfac":
                squares_a, squares_g = a_e.square().sum(1, keepdim=True), g_e.square().sum(1, keepdim=True)
                self._add(pair, "inputs", expert, (a_e * squares_g).mT @ a_e, len(a_e))
                self._add(pair, "gradients", expert, (g_e * squares_a).mT @ g_e, len(a_e))
                self._add(pair, "cross", expert, (squares_a.mT @ squares_g), len(a_e))
                continue
            if (pair.weight, "inputs") in self.sums:
                self._add(pair, "inputs", expert, a_e.mT @ a_e, len(a_e))
            self._add(pair, "gradients", expert, g_e.mT @ g_e, len(a_e))
        if self.kind == "tkfac":
            for segment, gradient in self._documents.of(pair, a, g):
                self._add(pair, "trace", self._expert(segment.expert), gradient.square().sum().reshape(1, 1), 1)

    def _shampoo(self, pair: Pair, a: Tensor, g: Tensor) -> None:
        terms: dict[int | None, list[Tensor]] = {}
        for segment, gradient in self._documents.of(pair, a, g):
            expert = self._expert(segment.expert) if pair.experts is not None else None
            found = [gradient.mT @ gradient, gradient @ gradient.mT, gradient.square().sum().reshape(1, 1)]
            before = terms.get(expert)
            terms[expert] = found if before is None else [x.add_(y) for x, y in zip(before, found)]
        for expert, (inputs, gradients, trace) in terms.items():
            self._add(pair, "inputs", expert, inputs, 1)
            self._add(pair, "gradients", expert, gradients, 1)
            self._add(pair, "trace", expert, trace, 1)

    def _expert(self, expert: int) -> int | None:
        return None if self.pooled else expert

    def _counted(self, pair: Pair) -> Iterator[tuple[int | None, Tensor | slice]]:
        """Yield the rows that count, of each expert; of one matrix, once."""
        real = pair.rows.documents_R >= 0
        if pair.experts is None or self.pooled:
            yield None, slice(None) if bool(real.all()) else real.nonzero().squeeze(1).to(pair.a_RM.device)
            return
        experts = pair.experts.cpu()
        for expert in experts[real].unique().tolist():
            yield expert, ((experts == expert) & real).nonzero().squeeze(1).to(pair.a_RM.device)

    def _add(self, pair: Pair, side: Term, expert: int | None, term: Tensor, tokens: int) -> None:
        if not tokens:
            return
        number = expert if pair.experts is not None and not self.pooled else None
        self.sums[pair.weight, side].add_term(term, tokens, number)


class SharedInputs:
    """Finds, in a backward, the weights that have the same inputs, such as q, k and v.

    Args:
        kinds: weight → with which it may share at all: those of an equal value.

    Attributes:
        owner: weight → the one of these that was seen first.
    """

    def __init__(self, kinds: Mapping[str, Any] | None = None) -> None:
        self.kinds = kinds or {}
        self.owner: dict[str, str] = {}
        self._recent: deque[tuple[Tensor, str]] = deque(maxlen=8)  # referenced, so that their memory is not reused

    def see(self, weight: str, a_RM: Tensor) -> None:
        """Compare the inputs of a weight with those that were seen last."""
        kind = self.kinds.get(weight)
        same = (o for a, o in self._recent if same_memory(a, a_RM) and self.kinds.get(o) == kind)
        now = next(same, weight)
        known = self.owner.setdefault(weight, now)
        if known != now and now != weight:
            raise PlanError(f"{weight} and {now} had the same inputs in one part of a batch and others in another")
        if now == weight:
            self._recent.append((a_RM, weight))


class CorrectedTerms:
    """Adds (Q_Sᵀ G_n Q_A)² of every document: the eigenvalues of the Fisher information in the basis of A and S.

    Args:
        bases: of a weight, Q_A and Q_S, of a stack perhaps one for each expert.
    """

    def __init__(self, bases: Mapping[str, tuple[Tensor, Tensor]], pooled: bool, sums: Sums):
        self.bases, self.pooled, self.sums = bases, pooled, sums
        self._documents = DocumentGradients()

    def take(self, pair: Pair) -> None:
        """Add what a pair gives."""
        Q_A, Q_S = (_wide(Q).to(pair.a_RM.device) for Q in self.bases[pair.weight])
        a, g = rotated(_wide(pair.a_RM), Q_A, pair.experts), rotated(_wide(pair.g_RN), Q_S, pair.experts)
        terms: dict[int | None, Tensor] = {}
        for segment, gradient in self._documents.of(pair, a, g):
            expert = segment.expert if pair.experts is not None and not self.pooled else None
            square = gradient.square()
            terms[expert] = square if expert not in terms else terms[expert].add_(square)
        for expert, term in terms.items():
            self.sums[pair.weight, "corrected"].add_term(term, 1, expert)


def rotated(rows_RM: Tensor, Q: Tensor, experts_R: Tensor | None) -> Tensor:
    """Return rows · Q; where Q is E × M × M, the rows of each expert by its own."""
    if Q.ndim == 2:
        return rows_RM @ Q.to(rows_RM.dtype)
    assert experts_R is not None
    result = torch.empty_like(rows_RM)
    for expert in experts_R.unique().tolist():
        chosen = experts_R == expert
        result[chosen] = rows_RM[chosen] @ Q[expert].to(rows_RM.dtype)
    return result


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
