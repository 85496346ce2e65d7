"""Adapter folders with a pair for each expert, under the names that experts have in published folders.

Engines that serve unstacked experts want them, `export(experts="each")` writes them, and peft wrote them for models
whose experts were linear layers of their own. There gate and up projections have an A each; here they are one stack,
whose adapter is then one of twice the rank.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.techniques.lora.settings import LoRAPattern
from treering.weights.expert_names import ExpertMatrix
from treering.weights.peft_layout import HALVES, PREFIX, opened, tensors_file

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix

# A matrix of an expert under its published name, and the stack that it is in the model.
EXPERT = re.compile(r"\.experts\.\d+\.(\w+)(?:\.lora_|$)")
STACKS = {"down_proj": "*.experts.down_proj", "w2": "*.experts.down_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj", "w1", "w3"), "*.experts.*up_proj"
)


def of_each_expert(folder: Path) -> bool:
    """Return whether the file has a pair for each expert, under published names."""
    with opened(tensors_file(folder)) as file:
        return any(EXPERT.search(key) for key in file.keys())  # noqa: SIM118


def two_in_one(folder: Path, rank: int, alpha: float, rslora: bool) -> dict[str, LoRAPattern]:
    """Return the pattern for stacks of two matrices whose adapters have an A each: one adapter of twice the rank."""
    with opened(tensors_file(folder)) as file:
        first: dict[str, Tensor] = {}
        for key in sorted(file.keys()):
            found = EXPERT.search(key)
            if found and key.endswith(".lora_A.weight") and STACKS.get(found[1]) == "*.experts.*up_proj":
                first.setdefault(found[1], file.get_tensor(key))
        equal = len({tuple(A.shape) for A in first.values()}) == 1 and all(
            torch.equal(A, next(iter(first.values()))) for A in first.values()
        )
    if len(first) < 2 or equal:
        return {}
    factor = len(first)
    return {"*.experts.*up_proj": LoRAPattern(rank=factor * rank, alpha=alpha * (factor**0.5 if rslora else factor))}


def read_experts(path: Path, matrix: "Matrix", rank: int, published: Sequence[ExpertMatrix]) -> tuple[Tensor, Tensor]:
    """Return the stacked pairs of a file that has one for each published matrix of each expert."""
    A = torch.zeros(*matrix.lead, rank, matrix.inputs)
    B = torch.zeros(*matrix.lead, matrix.outputs, rank)
    with opened(path) as file:
        present, used = set(file.keys()), dict.fromkeys(range(matrix.lead[0]), 0)  # rows of A that are taken
        for one in published:
            keys = [f"{PREFIX}{one.module}.lora_{half}.weight" for half in HALVES]
            if absent := [key for key in keys if key not in present]:
                raise CheckpointError(f"{path} has no {' and no '.join(absent)}; it is not an adapter of this model")
            a, b = (file.get_tensor(key) for key in keys)
            A, B = A.to(a.dtype), B.to(b.dtype)
            start, width = used[one.expert], len(a)
            if start and torch.equal(A[one.expert, :width], a):
                start = 0  # the matrices of one stack share it
            if start + width > rank or a.shape[1:] != A.shape[2:] or b.shape != (len(one.rows), width):
                raise CheckpointError(
                    f"{path}: the adapter of {one.module} is {tuple(a.shape)} and {tuple(b.shape)}; rank {rank} of "
                    f"{matrix.weight} has no place for it"
                )
            A[one.expert, start : start + width] = a
            B[one.expert, one.rows, start : start + width] = b
            used[one.expert] = start + width
    return A, B
