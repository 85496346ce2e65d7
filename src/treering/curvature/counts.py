"""How many tokens each matrix saw while statistics were measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treering.anatomy.matrices import Matrix
from treering.curvature.statistics import Statistics

TokenCounts = dict[str, tuple[int, ...]]  # weight -> tokens of its matrix, or of each of its experts


def counted(chosen: Sequence[Matrix], statistics: Any) -> TokenCounts:
    """Return the tokens that each weight's matrices saw; weights that the statistics do not have are left out."""
    counts: TokenCounts = {}
    for matrix in chosen:
        if isinstance(statistics, Statistics):  # without reading a tensor
            tokens = statistics.entries[matrix.weight].tokens if matrix.weight in statistics else None
            numbers = None if tokens is None else torch.tensor(tokens)
        else:
            numbers = tokens_of(statistics.get(matrix.weight))
        if numbers is not None:
            counts[matrix.weight] = tuple(numbers.reshape(-1).expand(matrix.experts or 1).tolist())
    return counts


def tokens_of(statistics: Mapping[str, Tensor] | None) -> Tensor | None:
    """Return the tokens of one weight, −1 where they were not counted. A matrix whose moment is 0 saw none, whatever
    the mapping contains."""
    if statistics is None or "inputs" not in statistics:
        return None
    seen = statistics["inputs"].diagonal(dim1=-2, dim2=-1).sum(-1) != 0
    return torch.where(seen, statistics.get("tokens", torch.tensor(-1)).to(torch.int64), 0)
