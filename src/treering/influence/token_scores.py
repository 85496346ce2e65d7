"""The score of each token of a document: what its inputs and output gradients give to the document's score.

    score = Σ over modules ⟨K, Σ_t g_t a_tᵀ⟩ = Σ_t Σ over modules g_tᵀ K a_t

K [N outputs, M inputs] is the row of the query, on the sides that the maps of the index make. So the scores of tokens
add up to that of the document before its row was rounded and, with eigen-topk, before coordinates were left out and its
norm was restored. A token's share is what training on the document learns at its place: its gradient also has what it
is needed for by later tokens.

R rows that reach a layer, T tokens of a document, Q queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from treering.core.topology import axis_size
from treering.curvature.capture import Pair, capture
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.targets import TargetPairs
from treering.data.examples import Document, Examples
from treering.influence.scores import ScoreTable, TokenScores
from treering.influence.sketched import Sketched, batch_of, packing_of
from treering.sketches.gradient_rows import module_names
from treering.sketches.maps import ModuleMap


class TokenProducts:
    """A sink of pairs that adds up the scores [T, Q] of the tokens of one document.

    Args:
        sketched: how gradients become rows of the index.
        queries: of each module the numbers [Q, rows · columns], from `query_rows`.
    """

    def __init__(self, sketched: Sketched, queries: Mapping[str, Tensor]):
        self.names = {name: module_names(target) for name, target in sketched.targets.items()}
        self.maps = sketched.maps
        self.kernels = {name: _kernel(one, queries[name]) for name, one in sketched.maps.items()}
        self.queries = len(next(iter(queries.values())))
        self.scores = torch.zeros(0, self.queries)

    def begin(self, tokens: int, device: torch.device | str) -> None:
        """Begin with a document of so many tokens."""
        self.scores = torch.zeros(tokens, self.queries, dtype=torch.float64, device=device)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """Add what a pair gives to the scores of its tokens."""
        tokens_R = pair.rows.documents_R.to(self.scores.device)
        experts_R = torch.zeros_like(tokens_R) if pair.experts is None else pair.experts.to(tokens_R)
        for expert in experts_R.unique().tolist():
            module = self.names[pair.weight][expert]
            chosen = ((experts_R == expert) & (tokens_R >= 0)).nonzero().squeeze(1)
            if module not in self.maps or not len(chosen):
                continue
            one, K_QNM = self.maps[module], self.kernels[module]
            g, a = one.map_gradients(pair.g_RN[chosen]), one.map_inputs(pair.a_RM[chosen])
            for q in range(self.queries):
                products = ((g @ K_QNM[q].to(g)) * a).sum(1, dtype=torch.float64)
                self.scores[:, q].index_add_(0, tokens_R[chosen], products)


def _kernel(one: ModuleMap, rows_QD: Tensor) -> Tensor:
    K = rows_QD.reshape(len(rows_QD), one.rows, one.columns)
    return K if one.weights is None else K * one.weights.to(K)


def token_scores(
    sketched: Sketched, documents: Sequence[Document], queries: Mapping[str, Tensor]
) -> list[NDArray[np.float32]]:
    """Return the scores [T, Q] of the tokens of each document. A collective: all ranks give the same documents.

    Args:
        sketched: of the index's run and settings.
        documents: training documents; each costs a forward and a backward.
        queries: of each module the numbers [Q, numbers], from `query_rows`.
    """
    run, mesh = sketched.run, sketched.run.plan.mesh
    subject, packing = MeasuredModel.of(run, None, None), packing_of(run)
    products = TokenProducts(sketched, {name: rows.to(run.plan.device) for name, rows in queries.items()})
    pairs = TargetPairs(sketched.targets.values(), products)
    weights = {target.weight for target in sketched.targets.values()}
    found = []
    with evaluating(run.model), capture(run.model, run.plan.anatomy, weights, pairs) as seen:
        for document in documents:
            batch = batch_of([document], packing)
            products.begin(batch["input_ids"].numel(), run.plan.device)
            subject.backward(seen, batch, batch.pop("real", None), "data", 0, each_token=True)
            if mesh is not None and axis_size(mesh, "sequence") > 1:
                dist.all_reduce(products.scores, group=mesh["sequence"].get_group())
            found.append(products.scores[: len(document.ids)].float().cpu().numpy())
    return found


def with_token_scores(
    table: ScoreTable, sketched: Sketched, examples: Examples, queries: Mapping[str, Tensor], number: int
) -> ScoreTable:
    """Return the table with the scores of the tokens of some documents; the others have none.

    Args:
        table: of all documents of `examples`, in their order.
        number: so many of the most helpful and so many of the most harmful ones, for each query and for their mean.
    """
    chosen: set[int] = set()
    for one in (*(table.reduced("sum", [query]) for query in table.queries), table.reduced("mean")):
        order = one.order(one.queries[0]).tolist()
        chosen.update(order[:number], order[-number:])
    rows = sorted(chosen)
    scores = token_scores(sketched, [examples.document(row) for row in rows], queries)
    lengths = np.zeros(len(table.documents), dtype=np.int64)
    lengths[rows] = [len(one) for one in scores]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return replace(table, tokens=TokenScores(offsets=offsets, scores=np.concatenate(scores)))
