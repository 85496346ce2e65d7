"""How adapters lie in a peft folder: the keys of its tensors and its adapter_config.json.

Adapters of stacked experts are 2-D there, and are called after the module that holds the stacks, not after the stack:

    A [E · r, inputs], an expert's rows together        B [outputs, r · E], of each rank all experts together
    MODULE.base_layer.lora_A    the first adapted stack of the module, if two are          MODULE.lora_A    the last one

Engines that serve some families want the adapter of every expert under the expert's published name in place of these,
`…experts.3.gate_proj.lora_A`: `each_expert`. Matrices that were one matrix of the stack then have the same A.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from treering.core.errors import CheckpointError, PlanError
from treering.store.untrusted import in_folder, read_header
from treering.technique import Adapter, Derived
from treering.weights.expert_names import ExpertMatrix, published_matrices

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

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
    return Adapter(
        name=name,
        keys=keys,
        config=body,
        derived=derived,
        only_with=only_with,
        each_expert=partial(each_expert, keys, pairs, body) if stacks else None,
    )


def each_expert(
    keys: Mapping[str, str], pairs: Sequence[PublishedPair], body: Mapping[str, Any], model: "PreTrainedModel"
) -> tuple[dict[str, Derived], dict[str, Any]]:
    """Return the tensors and the configuration of a folder with a pair for each expert; see `Adapter.each_expert`."""
    derived: dict[str, Derived] = {}
    modules, ranks, alphas = [], {}, {}
    for pair in pairs:
        if not pair.matrix.lead:
            modules.append(pair.matrix.module)
            named = {half: f"{PREFIX}{pair.matrix.module}.lora_{half}.weight" for half in HALVES}
            derived |= {key: _derived(pair, half) for half, key in named.items() if key not in keys.values()}
            continue
        for one in published_matrices(model, pair.matrix):
            modules.append(one.module)
            for half in HALVES:
                derived[f"{PREFIX}{one.module}.lora_{half}.weight"] = _of_expert(pair, half, one)
            ranks[one.module], alphas[one.module] = pair.rank, pair.alpha
    patterns = {
        "rank_pattern": body["rank_pattern"] | {name: rank for name, rank in ranks.items() if rank != body["r"]},
        "alpha_pattern": body["alpha_pattern"]
        | {name: alpha for name, alpha in alphas.items() if not math.isclose(alpha, body["lora_alpha"])},
    }
    stacks = {pair.target for pair in pairs if pair.matrix.lead}
    patterns = {key: {name: v for name, v in found.items() if name not in stacks} for key, found in patterns.items()}
    last = sorted({name.rpartition(".")[2] for name in modules})
    config = {name: value for name, value in body.items() if name not in ("target_parameters", "peft_version")}
    return derived, {**config, **patterns, "target_modules": last}


def _of_expert(pair: PublishedPair, half: Half, one: ExpertMatrix) -> Derived:
    def make(tensors: "Mapping[str, Tensor]") -> "Tensor":
        value = pair.half(half, tensors)[one.expert]
        return value if half == "A" else value[one.rows.to(value.device)]

    shape = (pair.rank, pair.matrix.inputs) if half == "A" else (len(one.rows), pair.rank)
    return Derived(names=pair.names, shape=shape, make=make)


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


def tensors_file(folder: Path) -> Path:
    """Return the file with the tensors of an adapter folder."""
    path = in_folder(folder, "adapter_model.safetensors")
    if path is None:
        other = "; adapter_model.bin is a pickle and never read" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{folder} has no adapter_model.safetensors{other}")
    return path


def opened(path: Path) -> Any:
    """Open the tensors of a file that may be anybody's, after a check of its header."""
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None
