"""How adapters lie in a peft folder: the keys of its tensors and its adapter_config.json.

Adapters of stacked experts are 2-D there, and are called after the module that holds the stacks, not after the stack:

    A [E · r, inputs], an expert's rows together        B [outputs, r · E], of each rank all experts together
    MODULE.base_layer.lora_A    the first adapted stack of the module, if two are          MODULE.lora_A    the last one
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from treering.core.errors import PlanError
from treering.technique import Adapter, Derived

if TYPE_CHECKING:
    from torch import Tensor

    from treering.anatomy.matrices import Matrix

PREFIX = "base_model.model."  # peft's wrapper classes show in its keys
Half = Literal["A", "B"]
HALVES: tuple[Half, ...] = ("A", "B")


@dataclass(frozen=True, kw_only=True)
class PublishedPair:
    """A and B of one weight, to be published.

    Attributes:
        rank: r; of a stack, that of every expert.
        alpha: the numerator of the scale.
        names: the live tensors that A and B are computed from.
        half: ("A" or "B", live tensors) → A [r, M] or B [N, r], with a leading E for a stack.
        parameters: the live parameters that A and B of a linear layer are, if they are parameters.
    """

    matrix: "Matrix"
    rank: int
    alpha: float
    names: tuple[str, ...]
    half: "Callable[[Half, Mapping[str, Tensor]], Tensor]"
    parameters: Mapping[Half, str] | None = None

    @property
    def target(self) -> str:
        """The name that peft has for what is adapted: a linear layer's module, or the parameter that is a stack."""
        return self.matrix.weight if self.matrix.lead else self.matrix.module


def describe(
    name: str, pairs: Sequence[PublishedPair], *, rank: int, alpha: float, rslora: bool = False, only_with: str = ""
) -> Adapter:
    """Return how the adapters `pairs` are published under `name`.

    Args:
        rank, alpha: what adapter_config.json says of all; those of pairs that differ are listed there as patterns.
        only_with: see `Adapter`.
    """
    keys, derived = {}, {}
    matrices = [pair.matrix for pair in pairs]
    for pair in pairs:
        for half in HALVES:
            key = f"{PREFIX}{_module(pair.matrix, matrices)}.lora_{half}.weight"
            if pair.parameters is not None and not pair.matrix.lead:
                keys[pair.parameters[half]] = key
            else:
                derived[key] = _derived(pair, half)
    stacks = [matrix.weight for matrix in matrices if matrix.lead]
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pair.target: pair.rank for pair in pairs if pair.rank != rank},
        "alpha_pattern": {pair.target: pair.alpha for pair in pairs if not math.isclose(pair.alpha, alpha)},
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(matrix.transposed for matrix in matrices if not matrix.lead),
        "target_modules": [matrix.module for matrix in matrices if not matrix.lead],
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if stacks:
        body |= {"target_parameters": stacks, "peft_version": "0.21.2"}  # whose packing this is
    return Adapter(name=name, keys=keys, config=body, derived=derived, only_with=only_with)


def _module(matrix: "Matrix", matrices: "Sequence[Matrix]") -> str:
    """Return the name under which peft stores an adapter. Its wrappers of one module's stacks are nested, the first
    parameter innermost."""
    if not matrix.lead:
        return matrix.module
    of_module = [m.weight for m in matrices if m.module == matrix.module]
    if len(of_module) > 2:
        raise PlanError(f"{matrix.module} holds {len(of_module)} stacks, and peft has names for the adapters of two")
    return matrix.module if matrix.weight == of_module[-1] else f"{matrix.module}.base_layer"


def _derived(pair: PublishedPair, half: Half) -> Derived:
    matrix, rank = pair.matrix, pair.rank
    if not matrix.lead:
        shape = (rank, matrix.inputs) if half == "A" else (matrix.outputs, rank)
        return Derived(names=pair.names, shape=shape, make=lambda tensors: pair.half(half, tensors))
    experts = matrix.lead[0]
    if half == "A":
        shape = (experts * rank, matrix.inputs)
        return Derived(names=pair.names, shape=shape, make=lambda tensors: pair.half("A", tensors).reshape(shape))
    shape = (matrix.outputs, rank * experts)
    return Derived(
        names=pair.names, shape=shape, make=lambda tensors: pair.half("B", tensors).permute(1, 2, 0).reshape(shape)
    )
