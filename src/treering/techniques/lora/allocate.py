"""`allocate: greedy`: the ranks of adapters, chosen for what quantizing leaves out, at equal parameter count.

Direction i of a matrix's residual R = W − Q(W) brings back σᵢ² of its squared error, with σ the singular values of
R C^½ for measured inputs of second moment C (`activation`), or of R (`residual`), times the number of tokens that the
matrix saw, and costs N + M parameters. The directions with the largest ratio are taken, as long as there are no more
parameters than with equal ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.collectives import gather_objects
from treering.core.owners import assign
from treering.curvature.counts import tokens_of
from treering.techniques.lora.settings import RESIDUAL, LoRASettings
from treering.techniques.lora.starts import damped, moment

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.anatomy.matrices import Matrix

LEAST = 1  # every matrix stays trainable, also an expert that no measured token reached
MOST = 4  # times `rank`: a stack is stored with its largest rank, so one expert's wish costs all others memory

_Settings = TypeVar("_Settings", bound=LoRASettings)


def allocated(config: "_Settings", anatomy: "Anatomy", source: Any, statistics: Any) -> "_Settings":
    """Return `config` with the ranks of quantized weights in `ranks`. A collective; the same on all ranks.

    Args:
        source: as `resolve` of a technique sees it.
        statistics: of `treering.measure`, or None.
    """
    chosen = [
        matrix
        for matrix in config.matrices(anatomy)
        if config.of(matrix).init in RESIDUAL and getattr(source.tensors[matrix.weight], "original", None) is not None
    ]
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    owners = assign({matrix.weight: float(matrix.rank * matrix.numel) for matrix in chosen}, world)
    local = {
        matrix.weight: gains(matrix, config, source.tensors[matrix.weight], (statistics or {}).get(matrix.weight))
        for matrix in chosen
        if owners[matrix.weight] == rank
    }
    by_weight = {name: value for part in gather_objects(local) for name, value in part.items()}
    uniform = [config.of(matrix).rank for matrix in chosen]
    ranks = greedy(chosen, [torch.tensor(by_weight[matrix.weight]) for matrix in chosen], uniform)
    return replace(config, ranks={matrix.weight: tuple(one) for matrix, one in zip(chosen, ranks, strict=True)})


@torch.no_grad()
def gains(
    matrix: "Matrix", config: LoRASettings, weight: Any, statistics: Mapping[str, Tensor] | None
) -> list[list[float]]:
    """Return for each of the weight's matrices what each further direction brings back, the largest first."""
    adapter = config.of(matrix)
    most = min(matrix.rank, MOST * adapter.rank)
    R = matrix.oriented(weight.original.read().double() - weight.read().double())
    each = list(R) if matrix.lead else [R]
    moments = moment(matrix, weight, statistics) if adapter.init == "activation" else [None] * len(each)
    tokens = tokens_of(statistics)
    seen = torch.ones(len(each)) if tokens is None or bool((tokens < 0).any()) else tokens.expand(len(each)).double()
    return [
        (spectrum(one, C)[:most] * count).tolist() for one, C, count in zip(each, moments, seen.tolist(), strict=True)
    ]


def spectrum(R_NM: Tensor, C_MM: Tensor | None) -> Tensor:
    """Return σ² of R C^½, the largest first; of R where there are no inputs."""
    C = damped(C_MM)
    if C is not None:
        R_NM = R_NM @ torch.linalg.cholesky(C)  # L Lᵀ = C: R L has the singular values of R C^½
    gram = R_NM @ R_NM.mT if R_NM.shape[0] <= R_NM.shape[1] else R_NM.mT @ R_NM
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def greedy(chosen: "Sequence[Matrix]", gains: Sequence[Tensor], uniform: Sequence[int]) -> list[list[int]]:
    """Return the rank of each matrix of each weight.

    Args:
        chosen: the weights.
        gains: of each weight, [matrices, directions], the largest first.
        uniform: the rank of each weight's matrices if it were equal; it decides how many parameters there are.
    """
    costs = [matrix.outputs + matrix.inputs for matrix in chosen]
    budget = sum(cost * rank * len(gain) for cost, rank, gain in zip(costs, uniform, gains, strict=True))
    budget -= sum(cost * LEAST * len(gain) for cost, gain in zip(costs, gains, strict=True))
    ratios = torch.cat([(gain[:, LEAST:] / cost).flatten() for gain, cost in zip(gains, costs, strict=True)])
    prices = torch.cat([torch.full((gain[:, LEAST:].numel(),), cost) for gain, cost in zip(gains, costs, strict=True)])
    order = torch.sort(ratios, descending=True, stable=True).indices
    order = order[prices[order].cumsum(0) <= budget]
    order = order[ratios[order] > 0]  # a direction that brings nothing back is not taken
    taken = torch.zeros(len(ratios), dtype=torch.int64)
    taken[order] = 1
    parts = taken.split([gain[:, LEAST:].numel() for gain in gains])
    return [(LEAST + part.view(len(gain), -1).sum(-1)).tolist() for part, gain in zip(parts, gains, strict=True)]
