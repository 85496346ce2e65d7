"""The first values of A and B: pure functions of the seed and the parameter's name, never of the rank."""

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


def splitter(matrix: "Matrix", config: "LoRASettings", prefix: str, seed: int) -> Split:
    """Return the `split` of a Part (see technique.py) for the start `config.init`; A and B are named after `prefix`."""

    def kaiming_zeros(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        bound = math.sqrt(1 / matrix.inputs)  # kaiming_uniform with a = √5, as peft and the paper's code start
        A = torch.empty(config.rank, matrix.inputs)
        A.uniform_(-bound, bound, generator=generator(seed, "lora", config.name, matrix.weight))
        return {f"{prefix}.A": A, f"{prefix}.B": torch.zeros(matrix.outputs, config.rank)}

    def pissa(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        W = weight.read().to(torch.promote_types(weight.dtype, torch.float32))
        base, A, B = reference.pissa(matrix.oriented(W), config.rank, config.scale)
        return {f"{prefix}.A": A, f"{prefix}.B": B, matrix.weight: matrix.oriented(base)}

    def file(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        from treering.techniques.lora.peft_format import read_pair

        assert config.file is not None
        A, B = read_pair(Path(config.file), matrix.module)
        wanted = (config.rank, matrix.inputs), (matrix.outputs, config.rank)
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise CheckpointError(
                f"{config.file}: the adapter of {matrix.module} has A {tuple(A.shape)} and B {tuple(B.shape)}; "
                f"this model and rank {config.rank} need {wanted[0]} and {wanted[1]}"
            )
        return {f"{prefix}.A": A, f"{prefix}.B": B}

    return {"kaiming_zeros": kaiming_zeros, "pissa": pissa, "file": file}[config.init]
