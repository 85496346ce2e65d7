"""The share of each token of a document in its score.

G = Σ_t g_t a_tᵀ, so a score ⟨G_q, H⁻¹ G⟩ is a sum over tokens: s_t = (M_S g_t)ᵀ Q (M_A a_t), Q the query's numbers.
It is computed from the gradients themselves, not from the index, which may have a part of a document's numbers only.

R rows of a layer, p and q numbers of its sides, Q queries.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treering.core.errors import PlanError
from treering.core.full_precision import full_precision
from treering.core.topology import axis_size
from treering.curvature.capture import capture
from treering.curvature.measured_model import MeasuredModel, evaluating
from treering.curvature.pairs import Pair
from treering.curvature.targets import TargetPairs
from treering.data.document import Document
from treering.data.loader import collate_measured
from treering.influence.sketched import Sketched, packing_of
from treering.sketches.gradient_rows import module_names
from treering.sketches.maps import ModuleMap


class TokenSums:
    """A sink that adds up what each token of a batch contributes to the scores of queries.

    Args:
        maps: of the modules.
        queries: their numbers [Q, numbers] by module.
    """

    def __init__(self, sketched: Sketched, queries: Mapping[str, Tensor]):
        self.maps = sketched.maps
        self.names = {name: module_names(target) for name, target in sketched.targets.items()}
        self.queries = {name: self._matrix(self.maps[name], rows) for name, rows in queries.items()}
        self.count = len(next(iter(queries.values())))
        self.scores = torch.zeros(0, self.count)

    def begin(self, tokens: int) -> None:
        """Begin with a batch of so many tokens."""
        self.scores = torch.zeros(tokens, self.count, dtype=torch.float64)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """Add what a pair gives."""
        places = pair.rows.places_R
        for expert, module in enumerate(self.names[pair.weight]):
            if module not in self.queries:
                continue
            chosen = slice(None) if pair.experts is None else pair.experts == expert
            a, g = pair.a_RM[chosen], pair.g_RN[chosen]
            if not len(a):
                continue
            mapped = self.maps[module]
            left, right = mapped.map_gradients(g), mapped.map_inputs(a)
            with full_precision():
                parts = [((left @ Q) * right).sum(1) for Q in self.queries[module].to(left)]
            rows = places if pair.experts is None else places[chosen.cpu()]  # type: ignore[union-attr]
            self.scores.index_add_(0, rows, torch.stack(parts, 1).double().cpu())

    def _matrix(self, mapped: ModuleMap, rows: Tensor) -> Tensor:
        """Return the numbers of queries as matrices between the sides of a document, [Q, p, q]."""
        matrices = rows.view(len(rows), mapped.rows, mapped.columns)
        return matrices if mapped.weights is None else matrices * mapped.weights.to(matrices)


def token_scores(
    sketched: Sketched, documents: Sequence[Document], queries: Mapping[str, Tensor]
) -> list[NDArray[np.float32]]:
    """Return the scores [tokens, queries] of each document. A collective.

    Args:
        sketched: of the index.
        documents: whose tokens are scored.
        queries: from `query_rows`.
    """
    run, subject = sketched.run, MeasuredModel.of(sketched.run, None, None)
    if (parts := axis_size(run.plan.mesh, "sequence")) > 1:
        raise PlanError(
            f"the mesh has a sequence axis of {parts}, and tokens are scored where documents are complete; use "
            "sequence: 1 for this",
            settings=("mesh.sequence",),
        )
    sink = TokenSums(sketched, queries)
    weights = {target.weight for target in sketched.targets.values()}
    pairs = TargetPairs(sketched.targets.values(), sink)
    found = []
    with evaluating(run.model), capture(run.model, run.plan.anatomy, weights, pairs) as seen:
        for document in documents:
            batch = collate_measured([document], packing_of(run))
            sink.begin(len(document.ids))
            subject.backward(seen, batch, batch.pop("real", None), "data", 0)
            found.append(sink.scores.float().numpy())
    return found
