"""The first values of A and B: pure functions of the seed and the weight's name, never of the rank of a process.

A stack of experts is started one expert at a time, each from a seed of its own, so that its values do not depend on
which experts a process has.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.core.seeds import generator
from treering.technique import LazyTensor
from treering.techniques.lora import reference

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import LoRASettings

Split = Callable[[LazyTensor, Callable[[], Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]
Pair = tuple[Tensor, Tensor]


def splitter(matrix: "Matrix", config: "LoRASettings", prefix: str, seed: int) -> Split:
    """Return the `split` of a Part (see technique.py) for the start `config.init`; A and B are named after `prefix`."""

    def kaiming_zeros(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        return named(_stacked(matrix, weight, lambda one: _kaiming_zeros(one, config, seed)))

    def pissa(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        W = matrix.oriented(weight.read().to(torch.promote_types(weight.dtype, torch.float32)))
        each = [reference.pissa(one, config.rank, config.scale) for one in (W if matrix.lead else [W])]
        base, A, B = (torch.stack(t) if matrix.lead else t[0] for t in zip(*each, strict=True))
        return named((A, B)) | {matrix.weight: matrix.oriented(base)}

    def file(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        from treering.techniques.lora.peft_format import read_pair

        assert config.file is not None
        A, B = read_pair(Path(config.file), matrix, config.rank)
        wanted = (*matrix.lead, config.rank, matrix.inputs), (*matrix.lead, matrix.outputs, config.rank)
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise CheckpointError(
                f"{config.file}: the adapter of {matrix.weight} has A {tuple(A.shape)} and B {tuple(B.shape)}; "
                f"this model and rank {config.rank} need {wanted[0]} and {wanted[1]}"
            )
        if matrix.lead:
            experts = slice(weight.start, weight.start + weight.shape[0])
            A, B = A[experts], B[experts]
        return named((A, B))

    def named(pair: Pair) -> dict[str, Tensor]:
        return {f"{prefix}.A": pair[0], f"{prefix}.B": pair[1]}

    return {"kaiming_zeros": kaiming_zeros, "pissa": pissa, "file": file}[config.init]


def _stacked(matrix: "Matrix", weight: LazyTensor, start: "Callable[[Matrix], Pair]") -> Pair:
    """Return the pair of a linear layer, or those of the experts that `weight` holds, stacked."""
    if not matrix.lead:
        return start(matrix)
    experts = matrix.each()[weight.start : weight.start + weight.shape[0]]
    pairs = [start(one) for one in experts]
    return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def _kaiming_zeros(one: "Matrix", config: "LoRASettings", seed: int) -> Pair:
    bound = math.sqrt(1 / one.inputs)  # kaiming_uniform with a = √5, as peft and the paper's code start
    A = torch.empty(config.rank, one.inputs)
    A.uniform_(-bound, bound, generator=generator(seed, "lora", config.name, one.name))
    return A, torch.zeros(one.outputs, config.rank)
