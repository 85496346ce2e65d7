"""How many tokens each matrix saw while statistics were measured."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.anatomy.matrices import Matrix, matrices
from treering.curvature.statistics import Statistics

if TYPE_CHECKING:
    from treering.anatomy import Anatomy

ENOUGH = 4  # tokens for each input dimension; with fewer the small eigenvalues of A are mostly chance
LEAST = 32768  # tokens that are measured of a model whose weights need fewer
_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")

TokenCounts = dict[str, tuple[int, ...]]  # weight -> tokens of its matrix, or of each of its experts


def enough_tokens(anatomy: "Anatomy", config: Any) -> int:
    """Return how many tokens give each input of each weight `ENOUGH` of them, if experts get equally many; or `LEAST`.

    Args:
        config: of the model, which knows how many experts a token chooses; unknown: one.
    """
    text = config.get_text_config()
    choices = next((n for n in (getattr(text, name, None) for name in _CHOICES) if isinstance(n, int) and n > 0), 1)
    inside = [matrix for matrix in matrices(anatomy) if matrix.block is not None]
    needs = [ENOUGH * one.inputs * (one.experts or choices) / choices for one in inside]
    return max(LEAST, *(ceil(need) for need in needs)) if needs else LEAST


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
