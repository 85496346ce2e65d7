"""The first values of A and B: pure functions of the seed and the weight's name, never of the rank of a process.

A stack of experts is started one expert at a time, each from a seed of its own, so that its values do not depend on
which experts a process has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from treering.core.errors import CheckpointError, PlanError
from treering.core.seeds import generator
from treering.technique import LazyTensor
from treering.techniques.lora import reference

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import AdapterSettings
    from treering.weights.expert_names import ExpertMatrix

DAMPING = 1e-4  # of the mean eigenvalue of the inputs' moment: few tokens leave directions without any

Split = Callable[[LazyTensor, Callable[[], Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]
Pair = tuple[Tensor, Tensor]


def splitter(
    matrix: "Matrix",
    config: "AdapterSettings",
    prefix: str,
    seed: int,
    *,
    published: "Sequence[ExpertMatrix]" = (),
    original: LazyTensor | None = None,
) -> Split:
    """Return the `split` of a Part (see technique.py) for the start `config.init`.

    Args:
        prefix: of the names of A and B.
        published: of the start `file`: what a stack is in a published folder, if the file has a pair for each expert.
        original: the unquantized weight, where the model's folder stores it quantized.
    """

    def ranks(weight: LazyTensor) -> tuple[int, ...]:
        """Return the rank of each matrix that `weight` holds."""
        return config.ranks[weight.start : weight.start + weight.shape[0]] if matrix.lead else config.ranks

    def kaiming_zeros(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        return named(_stacked(matrix, weight, lambda one: _kaiming_zeros(one, config, seed)))

    def pissa(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        W = matrix.oriented(weight.read().to(torch.promote_types(weight.dtype, torch.float32)))
        each = [reference.pissa(one, config.rank, config.scale) for one in (W if matrix.lead else [W])]
        base, A, B = (torch.stack(t) if matrix.lead else t[0] for t in zip(*each, strict=True))
        return named((A, B)) | {matrix.weight: matrix.oriented(base)}

    def residual(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        if weight.stored is not None and original is None:
            raise PlanError(
                f"lora: {matrix.weight} is stored quantized in the model's folder, so there is no residual to start "
                "from; name the folder of the unquantized model as lora.original, or set lora.init to kaiming_zeros",
                settings=("techniques.lora.init",),
            )
        W = weight.read() if original is None else _rows_like(original, weight, matrix)
        R = matrix.oriented(W.double() - below().double())
        moments = moment(matrix, weight, statistics) if config.init == "activation" else None
        each = [
            widened(_closest(one, None if moments is None else moments[i], rank, config.scale), config.rank)
            for i, (one, rank) in enumerate(zip(R if matrix.lead else [R], ranks(weight), strict=True))
        ]
        A, B = (torch.stack(t) if matrix.lead else t[0] for t in zip(*each, strict=True))
        return named((A, B))

    def file(weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None):
        from treering.techniques.lora.peft_format import read_pair

        assert config.file is not None
        A, B = read_pair(Path(config.file), matrix, config.rank, published)
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

    starts = {"kaiming_zeros": kaiming_zeros, "pissa": pissa, "file": file}
    return starts.get(config.init, residual)


def _rows_like(original: LazyTensor, weight: LazyTensor, matrix: "Matrix") -> Tensor:
    """Return the unquantized values of the experts that `weight` holds, or of the matrix."""
    if not matrix.lead:
        return original.read()
    return original.rows(weight.start, weight.start + weight.shape[0])


def _stacked(matrix: "Matrix", weight: LazyTensor, start: "Callable[[Matrix], Pair]") -> Pair:
    """Return the pair of a linear layer, or those of the experts that `weight` holds, stacked."""
    if not matrix.lead:
        return start(matrix)
    experts = matrix.each()[weight.start : weight.start + weight.shape[0]]
    pairs = [start(one) for one in experts]
    return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def moment(matrix: "Matrix", weight: LazyTensor, statistics: Mapping[str, Tensor] | None) -> Tensor:
    """Return the second moments of the inputs of the matrices that `weight` holds, [matrices, M, M]."""
    remedy = (
        "measure this model (treering measure MODEL --data FILE --to DIR) and name the folder as statistics.path, or "
        "set lora.init to residual"
    )
    if statistics is None or "inputs" not in statistics:
        raise PlanError(
            f"lora: init activation needs the inputs of {matrix.weight}, and no statistics hold them; {remedy}",
            settings=("statistics.path", "techniques.lora.init"),
        )
    moments = statistics["inputs"].double().reshape(-1, *statistics["inputs"].shape[-2:])
    count = weight.shape[0] if matrix.lead else 1
    if tuple(moments.shape) != (count, matrix.inputs, matrix.inputs):
        raise PlanError(
            f"lora: the statistics hold {tuple(moments.shape)} for {matrix.weight}, whose inputs need "
            f"{(count, matrix.inputs, matrix.inputs)}; they are of another model: {remedy}",
            settings=("statistics.path",),
        )
    return moments


def _closest(R: Tensor, C: Tensor | None, rank: int, scale: float) -> Pair:
    """Return the pair for one residual. Without inputs (an expert that no token reached) all directions count alike."""
    C = damped(C)
    if C is None:
        return reference.closest(R, rank, scale)
    return reference.closest_for_inputs(R, C, rank, scale)


def damped(C: Tensor | None) -> Tensor | None:
    """Return a moment of inputs that has an inverse; None where there were no inputs."""
    mean = 0.0 if C is None else float(C.diagonal().mean())
    if C is None or not mean > 0:
        return None
    return C + DAMPING * mean * torch.eye(len(C), dtype=C.dtype)


def widened(pair: Pair, rank: int) -> Pair:
    """Return the pair with zeros up to `rank`: they add nothing, and neither half has a gradient there."""
    (A, B), missing = pair, rank - len(pair[0])
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


def _kaiming_zeros(one: "Matrix", config: "AdapterSettings", seed: int) -> Pair:
    bound = math.sqrt(1 / one.inputs)  # kaiming_uniform with a = √5, as peft and the paper's code start
    A = torch.empty(config.rank, one.inputs)
    A.uniform_(-bound, bound, generator=generator(seed, "lora", config.name, one.name))
    return A, torch.zeros(one.outputs, config.rank)
