"""An adapter in the free directions is a LoRA adapter of as many ranks, and is published as one, for peft to load.

ΔW = c · B_out Z B_inᵀ = (lora_B) (lora_A), split where it is narrow
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.osft.targets import Target
from treering.technique import Adapter, Derived

if TYPE_CHECKING:
    from treering.osft.addend import Addend

PREFIX = "base_model.model."  # peft's wrapper classes show in its keys


def describe(chosen: Sequence[Target], model: nn.Module) -> Adapter:
    derived: dict[str, Derived] = {}
    ranks: dict[str, int] = {}
    for target in chosen:
        addend: Addend = model.get_submodule(f"{target.module}.osft")  # type: ignore[assignment]
        own = tuple(f"{target.module}.osft.{name}" for name, _ in addend.named_parameters())
        rank = min(addend.Z.shape)
        ranks[target.module] = rank
        for half, shape in (("A", (rank, target.inputs)), ("B", (target.outputs, rank))):
            derived[f"{PREFIX}{target.module}.lora_{half}.weight"] = Derived(
                names=own,
                shape=shape,
                make=lambda tensors, half=half, addend=addend: _half(half, addend, tensors),  # type: ignore[misc]
            )
    first = next(iter(ranks.values()))
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first,
        "lora_alpha": first,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != first},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in chosen),
        "target_modules": list(ranks),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return Adapter(name="osft", keys={}, derived=derived, config=body)


def _half(half: str, addend: "Addend", tensors: Mapping[str, Tensor]) -> Tensor:
    from treering.osft.addend import held

    mine = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    Z = held(addend.ends, mine)
    out, into = mine.get("B_out"), mine.get("B_in")
    if Z.shape[0] <= Z.shape[1]:  # few rows: A is Z seen through the basis of inputs, B the basis of outputs
        if half == "A":
            return Z if into is None else Z @ into.mT
        return _identity(Z.shape[0], Z) if out is None else out
    if half == "B":
        return Z if out is None else out @ Z
    return _identity(Z.shape[1], Z) if into is None else into.mT


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
