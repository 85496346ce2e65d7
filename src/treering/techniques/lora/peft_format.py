"""Adapter folders as peft writes and reads them: adapter_config.json and adapter_model.safetensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.core.errors import CheckpointError
from treering.store.untrusted import in_folder, read_header, read_json
from treering.technique import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import LoRASettings

PREFIX = "base_model.model."  # peft's wrapper classes show in its keys
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights"}
# Where the adapter came from and how it was trained: nothing that changes what its tensors mean. Any other key that is
# set changes the arithmetic in a way that this lora does not have, and is refused, not ignored.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
STARTS = ("gaussian", "eva", "orthogonal")  # of peft, by name, that leave the base model as it was


def describe(config: "LoRASettings", matrices: "Sequence[Matrix]") -> Adapter:
    """Return how the adapters of `matrices` are published: peft's keys and its adapter_config.json."""
    keys = {}
    for matrix in matrices:
        for half in ("A", "B"):
            keys[f"{matrix.module}.lora_{config.name}.{half}"] = f"{PREFIX}{matrix.module}.lora_{half}.weight"
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(matrix.transposed for matrix in matrices),
        "target_modules": [matrix.module for matrix in matrices],
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return Adapter(name=config.name, keys=keys, config=body)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter folder as keywords of `LoRA`."""
    path = folder / "adapter_config.json"
    if in_folder(folder, path.name) is None:
        raise CheckpointError(f"{folder} is not an adapter folder: it has no adapter_config.json")
    body = read_json(path)
    if body.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {body.get('peft_type')!r}; only LORA adapters can be read")
    _refuse_unknown(path, body)
    rank, alpha = body.get("r"), body.get("lora_alpha", 8)  # 8 is peft's default, whatever r is
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{path}: r is {rank!r}; it must be a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}; it must be a number greater than 0")
    return {
        # peft matches by suffix or regular expression; the tensors in the file are the sure list
        "targets": tuple(_adapted(folder)),
        "rank": rank,
        "alpha": float(alpha),
        "rslora": bool(body.get("use_rslora", False)),
    }


def _refuse_unknown(path: Path, body: Mapping[str, Any]) -> None:
    unknown = sorted(key for key, value in body.items() if value and key not in READ | HARMLESS)
    if unknown or body.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: {', '.join(unknown) or 'bias'} is set, which this lora does not have")
    start = body.get("init_lora_weights")
    if isinstance(start, str) and start not in STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, a start that changes the base model, so the adapter does not fit "
            "the original one; let peft convert it when it saves (path_initial_model_for_weight_conversion)"
        )
    if not isinstance(body.get("target_modules"), str | list) or not body["target_modules"]:
        raise CheckpointError(f"{path}: target_modules is {body.get('target_modules')!r}; it must name modules")


def read_pair(folder: Path, fqn: str) -> "tuple[Tensor, Tensor]":
    """Return (A, B) of the linear layer `fqn`."""
    path = _tensors_file(folder)
    with _opened(path) as file:
        keys = {f"{PREFIX}{fqn}.{name}.weight" for name in ("lora_A", "lora_B")}
        absent = sorted(keys - set(file.keys()))
        if absent:
            raise CheckpointError(f"{path} has no {' and no '.join(absent)}; it is not an adapter of this model")
        return tuple(file.get_tensor(f"{PREFIX}{fqn}.{name}.weight") for name in ("lora_A", "lora_B"))  # type: ignore[return-value]


def _adapted(folder: Path) -> list[str]:
    path = _tensors_file(folder)
    with _opened(path) as file:
        keys = list(file.keys())
    ends = (".lora_A.weight", ".lora_B.weight")
    unknown = [key for key in keys if not (key.startswith(PREFIX) and key.endswith(ends))]
    if unknown:
        raise CheckpointError(f"{path} holds {unknown[0]!r}, which is not the A or B of a linear layer")
    halves = [{key.removesuffix(end) for key in keys if key.endswith(end)} for end in ends]
    single = sorted(halves[0] ^ halves[1])
    if single:
        raise CheckpointError(f"{path} has no {single[0]}{ends[single[0] in halves[0]]}, the other half of an adapter")
    return [key.removeprefix(PREFIX).removesuffix(ends[0]) for key in keys if key.endswith(ends[0])]


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None


def _tensors_file(folder: Path) -> Path:
    path = in_folder(folder, "adapter_model.safetensors")
    if path is None:
        other = "; adapter_model.bin is a pickle and never read" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{folder} has no adapter_model.safetensors{other}")
    return path
