"""Where A and B begin. Each start is a pure function of the seed and the parameter's name, never of the rank."""

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
    from treering.anatomy import Linear
    from treering.techniques.lora.settings import LoRASettings

Split = Callable[[LazyTensor, Callable[[], Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]


def splitter(linear: "Linear", config: "LoRASettings", own: str, seed: int) -> Split:
    def kaiming_zeros(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        bound = math.sqrt(1 / linear.inputs)  # kaiming_uniform with a = √5, as peft and the paper's code start
        A = torch.empty(config.rank, linear.inputs)
        A.uniform_(-bound, bound, generator=generator(seed, "lora", config.name, linear.weight))
        return {f"{own}.A": A, f"{own}.B": torch.zeros(linear.outputs, config.rank)}

    def pissa(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        W = weight.read().to(torch.promote_types(weight.dtype, torch.float32))
        base, A, B = reference.pissa(W.T if linear.transposed else W, config.rank, config.scale)
        return {f"{own}.A": A, f"{own}.B": B, linear.weight: base.T if linear.transposed else base}

    def file(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        from treering.techniques.lora.peft_format import read_pair

        assert config.file is not None
        A, B = read_pair(Path(config.file), linear.fqn)
        wanted = (config.rank, linear.inputs), (linear.outputs, config.rank)
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise CheckpointError(
                f"{config.file}: the adapter of {linear.fqn} has A {tuple(A.shape)} and B {tuple(B.shape)}; "
                f"this model and rank {config.rank} need {wanted[0]} and {wanted[1]}"
            )
        return {f"{own}.A": A, f"{own}.B": B}

    return {"kaiming_zeros": kaiming_zeros, "pissa": pissa, "file": file}[config.init]
