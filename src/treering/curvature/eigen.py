"""Eigenvectors of the factors: each by one rank, in float64, with a sign that does not depend on the solver.

An eigenvector is a direction without a sign. An index that keeps coordinates in the basis needs one, so the element of
largest magnitude is positive. Eigenvalues ascend, and those below 0, which are rounding, are 0.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.owners import assign


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors, […, M, M], as columns, and the eigenvalues, […, M], ascending, both in float32."""
    values, vectors = torch.linalg.eigh(matrix.double())
    at = vectors.abs().argmax(-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, at).sign()
    return vectors.float().contiguous(), values.clamp_min(0).float()


def decompose_all(
    matrices: Iterable[tuple[Any, Tensor]], device: torch.device
) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    """Yield (name, (Q, values)) of all matrices, on every rank. A collective: work is shared, the largest first.

    Args:
        matrices: the same on all ranks, in the same order.
        device: of the messages.
    """
    given = dict(matrices)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    places = {str(name): name for name in given}
    costs = {text: float(given[name].numel() * given[name].shape[-1]) for text, name in places.items()}
    owners = assign(costs, ranks)
    results = {text: decomposed(given[places[text]]) for text, owner in owners.items() if owner == rank}
    for name, matrix in given.items():
        owner = owners[str(name)]
        if ranks == 1:
            yield name, results.pop(str(name))
            continue
        Q, values = results.pop(str(name), (torch.empty(matrix.shape), torch.empty(matrix.shape[:-1])))
        Q, values = Q.to(device).contiguous(), values.to(device).contiguous()
        dist.broadcast(Q, src=owner)
        dist.broadcast(values, src=owner)
        yield name, (Q.cpu(), values.cpu())
