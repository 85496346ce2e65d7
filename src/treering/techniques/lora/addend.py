"""An adapter next to a linear layer: a small module of its own, whose output is added to the layer's; its first values.

    A_rM  rank × inputs        B_Nr  outputs × rank

A module of its own, because FSDP's unit of dtype is the module: adapters pinned to float32 inside a bfloat16 model
need a unit that does not cast them. First values are pure functions of the seed and the parameter's name, never of the
rank.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core import module_forward
from treering.core.errors import CheckpointError, PlanError
from treering.core.seeds import generator
from treering.technique import Applied, LazyTensor, Part, Site, TrainedMatrix
from treering.techniques.lora import reference
from treering.techniques.lora.peft_format import describe

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import LoRASettings

Split = Callable[[LazyTensor, Callable[[], Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]


class Addend(nn.Module):
    """Return s · B A x, computed in the dtype of A and B, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + scale · B A x. The scale is applied to the few numbers in between."""
        low = F.linear(x.to(self.A.dtype), self.A) * self.scale
        if y.dtype != self.B.dtype or y.ndim < 2:
            return y + F.linear(low, self.B).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.B.mT).view_as(y)

    def matrices(self, prefix: str, linear: str) -> tuple[TrainedMatrix, TrainedMatrix]:
        """Return where the inputs and output gradients of A and B are seen; their live names begin with `prefix`."""
        return (
            TrainedMatrix(
                name=f"{prefix}.A", module=linear, outputs=lambda g: g.to(self.B.dtype) @ self.B * self.scale
            ),
            TrainedMatrix(
                name=f"{prefix}.B",
                module=linear,
                inputs=lambda a: F.linear(a.to(self.A.dtype), self.A),
                outputs=lambda g: g.to(self.B.dtype) * self.scale,
            ),
        )


def install(model: nn.Module, config: "LoRASettings", site: Site) -> Applied:
    """Put an adapter next to each linear layer that the settings name."""
    parts, names, undo, maps = {}, [], [], {}
    added: list[module_forward.AddedForward] = []
    matrices = config.matrices(site.anatomy)
    for matrix in matrices:
        module = model.get_submodule(matrix.module)
        weight = getattr(module, "weight", None)
        if config.dtype != "base":
            dtype = getattr(torch, config.dtype)
        elif weight is not None:
            dtype = weight.dtype
        else:
            raise PlanError(f"lora: {matrix.module} has no plain weight whose dtype could be used; set lora.dtype")
        addend = Addend(matrix.inputs, matrix.outputs, config.rank, config.scale, dtype, torch.device("meta"))
        child = f"lora_{config.name}"
        if hasattr(module, child):
            raise PlanError(
                f"lora: {matrix.module} already has an adapter called {config.name!r}; give this one another name"
            )
        module.add_module(child, addend)
        added.append(module_forward.AddedForward(module, addend))
        undo.append(module_forward.install(added[-1]))
        prefix = f"{matrix.module}.{child}"
        maps[matrix.weight] = addend.matrices(prefix, matrix.module)
        names += [f"{prefix}.A", f"{prefix}.B"]
        stored = weight.dtype if weight is not None else torch.float32
        parts[matrix.weight] = _part(matrix, config, prefix, dtype, stored, site.seed)

    note = f"{len(matrices)} adapters of rank {config.rank}, scale {config.scale:g}, start {config.init}"
    return Applied(
        trainable=tuple(names),
        parts=parts,
        adapter=describe(config, matrices),
        undo=module_forward.undo_all(undo),
        maps=maps,
        # PiSSA moved part of the base into A and B: without them, the model is not the base model.
        without=None if config.init == "pissa" else partial(module_forward.switched_off, added),
        notes=(note,),
    )


def _part(
    matrix: "Matrix", config: "LoRASettings", prefix: str, dtype: torch.dtype, stored: torch.dtype, seed: int
) -> Part:
    def product(tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        BA = (tensors[f"{prefix}.B"].to(wide) @ tensors[f"{prefix}.A"].to(wide)).mul_(config.scale)
        return matrix.oriented(BA).to(like.device)

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        return below + product(tensors, below)

    pissa = config.init == "pissa"
    return Part(
        names=(f"{prefix}.A", f"{prefix}.B"),
        split=splitter(matrix, config, prefix, seed),
        join=join,
        reads_weight=pissa,
        moves_base=pissa,
        compute_dtype=None if config.dtype == "base" else dtype,
        tolerance=_tolerance(config, dtype, stored),
        cost=float(matrix.rank * matrix.numel) if pissa else 0.0,
    )


def _tolerance(config: "LoRASettings", dtype: torch.dtype, stored: torch.dtype) -> float | None:
    if config.init == "file":
        return None  # an imported adapter changes the weight
    if config.init == "kaiming_zeros":
        return 0.0
    # The moved base is rounded to the dtype it is stored in, and A and B to theirs.
    return 4 * max(torch.finfo(stored).eps, torch.finfo(dtype).eps)


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
