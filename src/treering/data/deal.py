"""Bins of a step to ranks: longest first, so that no rank waits long for another."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Attention's cost of a document of L tokens is L² times this, in units of one token's other work: about
# 1 / (6 × width) for a model of width 4096. Only the balance depends on it, never a result.
QUADRATIC = 1 / 24_576


def cost(documents: Sequence[int], lengths: NDArray[np.int32], quadratic: float = QUADRATIC) -> float:
    sizes = np.asarray(lengths)[list(documents)].astype(np.float64)
    return float(sizes.sum() + quadratic * (sizes**2).sum())


def deal(
    bins: Sequence[list[int]], lengths: NDArray[np.int32], ranks: int, quadratic: float = QUADRATIC
) -> list[list[list[int]]]:
    """For each rank its bins, as many for every rank: collectives run once a micro-step. An empty bin fills a gap.

    Each rank's are in descending cost, so that the ranks' i-th micro-steps are alike.
    """
    each = -(-len(bins) // ranks)
    costs = [cost(documents, lengths, quadratic) for documents in bins]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for i in sorted(range(len(bins)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < each), key=lambda r: (load[r], r))
        dealt[rank].append(bins[i])
        load[rank] += costs[i]
    return [own + [[] for _ in range(each - len(own))] for own in dealt]
