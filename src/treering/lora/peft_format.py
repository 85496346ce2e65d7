"""Adapter folders as peft writes and reads them: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.errors import CheckpointError
from treering.technique import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from treering.anatomy import Anatomy, Linear
    from treering.lora.config import LoRA

PREFIX = "base_model.model."  # peft's wrapper classes show in its keys
# Settings of peft that change the arithmetic and that we do not have: present and set means refused, not ignored.
UNKNOWN = ("rank_pattern", "alpha_pattern", "use_dora", "layer_replication", "modules_to_save", "target_parameters")


def describe(config: "LoRA", linears: "Iterable[Linear]", anatomy: "Anatomy") -> Adapter:
    linears = tuple(linears)
    keys = {}
    for linear in linears:
        for own, theirs in (("A", "lora_A"), ("B", "lora_B")):
            keys[f"{linear.fqn}.lora_{config.name}.{own}"] = f"{PREFIX}{linear.fqn}.{theirs}.weight"
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(linear.transposed for linear in linears),
        "target_modules": [linear.fqn for linear in linears],
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return Adapter(name=config.name, keys=keys, config=body)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder as keywords of `LoRA`."""
    path = folder / "adapter_config.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not an adapter folder: it has no adapter_config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("peft_type") != "LORA":
        found = body.get("peft_type") if isinstance(body, dict) else type(body).__name__
        raise CheckpointError(f"{path}: peft_type is {found!r}; only LORA adapters can be read")
    strange = [key for key in UNKNOWN if body.get(key)]
    if strange or body.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: {', '.join(strange) or 'bias'} is set, and this lora has no such thing")
    targets = body.get("target_modules")
    if not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
        raise CheckpointError(f"{path}: target_modules must be a list of module names; it is {targets!r}")
    if not isinstance(body.get("r"), int):
        raise CheckpointError(f"{path}: r is {body.get('r')!r}; it must be a whole number")
    return {
        # peft matches by suffix; the tensors in the file are the sure list
        "targets": tuple(_adapted(folder)),
        "rank": body["r"],
        "alpha": float(body.get("lora_alpha") or body["r"]),
        "rslora": bool(body.get("use_rslora", False)),
    }


def read_pair(folder: Path, fqn: str) -> "tuple[Tensor, Tensor]":
    """(A, B) of the linear `fqn`."""
    from safetensors import safe_open

    path = _tensors(folder)
    with safe_open(path, "pt") as file:
        keys = {f"{PREFIX}{fqn}.{name}.weight" for name in ("lora_A", "lora_B")}
        absent = sorted(keys - set(file.keys()))
        if absent:
            raise CheckpointError(f"{path} has no {' and no '.join(absent)}; it is not an adapter of this model")
        return tuple(file.get_tensor(f"{PREFIX}{fqn}.{name}.weight") for name in ("lora_A", "lora_B"))  # type: ignore[return-value]


def _adapted(folder: Path) -> list[str]:
    from safetensors import safe_open

    path = _tensors(folder)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    ends = (".lora_A.weight", ".lora_B.weight")
    strange = [key for key in keys if not (key.startswith(PREFIX) and key.endswith(ends))]
    if strange:
        raise CheckpointError(f"{path} holds {strange[0]!r}, which is not the A or B of a linear")
    return [key.removeprefix(PREFIX).removesuffix(ends[0]) for key in keys if key.endswith(ends[0])]


def _tensors(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        other = "; adapter_model.bin is a pickle and never read" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{folder} has no adapter_model.safetensors{other}")
    return path
