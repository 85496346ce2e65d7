"""Adapter folders as peft writes and reads them: adapter_config.json and adapter_model.safetensors.

Their layout, and how experts lie in it, is that of `weights.peft_layout`. Before peft 0.19 inputs and outputs of
experts were exchanged. The two cannot be told apart where they are equal, except by the version that the folder names.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treering.core.errors import CheckpointError
from treering.store.untrusted import in_folder, read_json
from treering.technique import Adapter
from treering.techniques.lora.peft_experts import EXPERT, STACKS, read_experts, two_in_one
from treering.techniques.lora.settings import RESIDUAL, LoRAPattern
from treering.weights import peft_layout
from treering.weights.expert_names import ExpertMatrix
from treering.weights.peft_layout import HALVES, PREFIX, Half, PublishedPair, opened, tensors_file

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import LoRASettings

READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "bias",
    "init_lora_weights",
}
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
    alpha = config.rank if config.alpha is None else config.alpha
    residual = any(config.of(matrix).init in RESIDUAL for matrix in matrices)
    only_with = "the quantized base, whose error it makes up for" if residual else ""
    pairs = [_pair(config, matrix) for matrix in matrices]
    return peft_layout.describe(
        config.name, pairs, rank=config.rank, alpha=alpha, rslora=config.rslora, only_with=only_with
    )


def _pair(config: "LoRASettings", matrix: "Matrix") -> PublishedPair:
    chosen = config.of(matrix)
    names: dict[Half, str] = {half: f"{matrix.module}.{config.child(matrix)}.{half}" for half in HALVES}
    return PublishedPair(
        matrix=matrix,
        rank=chosen.rank,
        alpha=chosen.scale * (chosen.rank**0.5 if config.rslora else chosen.rank),
        names=tuple(names.values()),
        half=lambda half, tensors: tensors[names[half]],
        parameters=names,
    )


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
    # peft matches modules by suffix or regular expression; the tensors in the file are the sure list
    targets = tuple(_adapted(folder, body))
    rslora = bool(body.get("use_rslora", False))
    return {
        "targets": targets,
        "rank": rank,
        "alpha": float(alpha),
        "rslora": rslora,
        "patterns": _read_patterns(path, body, targets) | two_in_one(folder, rank, float(alpha), rslora),
    }


def _read_patterns(path: Path, body: Mapping[str, Any], targets: Sequence[str]) -> dict[str, LoRAPattern]:
    """Return what rank_pattern and alpha_pattern say of the targets that they name."""
    chosen: dict[str, dict[str, Any]] = {}
    for key, field in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        patterns = body.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {key} is {patterns!r}; it must be a mapping of names")
        for name, value in patterns.items():
            number = isinstance(value, int if field == "rank" else int | float) and not isinstance(value, bool)
            if not number or not value > 0:
                raise CheckpointError(f"{path}: {key} gives {name!r} {value!r}; it must be a number greater than 0")
            if not re.fullmatch(r"[\w.]+", name):
                raise CheckpointError(
                    f"{path}: {key} has the regular expression {name!r}, which is not evaluated for a file that may be "
                    "anybody's; write the modules' names in its place, each with its value"
                )
        for target in targets:  # the first that matches counts, as in peft
            if (name := next((name for name in patterns if _ends(target, name)), None)) is not None:
                chosen.setdefault(target, {})[field] = patterns[name]
    return {target: LoRAPattern(**fields) for target, fields in chosen.items()}


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
    modules, parameters = body.get("target_modules"), body.get("target_parameters")
    if not isinstance(parameters or [], list):
        raise CheckpointError(f"{path}: target_parameters is {parameters!r}; it must be a list of names")
    if not (isinstance(modules, str | list) and modules) and not parameters:
        raise CheckpointError(f"{path}: target_modules is {modules!r}; it must name modules")


def read_pair(
    folder: Path, matrix: "Matrix", rank: int, published: Sequence[ExpertMatrix] = ()
) -> tuple[Tensor, Tensor]:
    """Return (A, B) of a linear layer, or of a stack of experts: [E, r, inputs] and [E, outputs, r].

    Args:
        published: what the stack is in a published folder, where the file has a pair for each expert.
    """
    path = tensors_file(folder)
    if published:
        return read_experts(path, matrix, rank, published)
    with opened(path) as file:
        name, present = matrix.module, set(file.keys())
        inner = matrix.lead and not matrix.leaf.startswith("down")  # the first stack of its module
        if inner and f"{PREFIX}{name}.base_layer.lora_A.weight" in present:
            name = f"{name}.base_layer"
        keys = [f"{PREFIX}{name}.{half}.weight" for half in ("lora_A", "lora_B")]
        if absent := [key for key in keys if key not in present]:
            raise CheckpointError(f"{path} has no {' and no '.join(absent)}; it is not an adapter of this model")
        A, B = (file.get_tensor(key) for key in keys)
    if not matrix.lead:
        return A, B
    experts = matrix.lead[0]
    wanted = (experts * rank, matrix.inputs), (matrix.outputs, rank * experts)
    shapes = tuple(A.shape), tuple(B.shape)
    exchanged = (experts * rank, matrix.outputs), (matrix.inputs, rank * experts)
    if shapes == exchanged and (shapes != wanted or _exchanges(folder)):
        raise CheckpointError(
            f"{path}: the adapters of {matrix.weight} have inputs and outputs exchanged, as peft before 0.19 wrote "
            "them. Open the folder with the peft that wrote it, merge it or convert it, and save it with a newer one"
        )
    if shapes != wanted:
        raise CheckpointError(
            f"{path}: the adapters of {matrix.weight} are {shapes[0]} and {shapes[1]}; this model and rank {rank} need "
            f"{wanted[0]} and {wanted[1]}"
        )
    return A.view(experts, rank, -1), B.view(matrix.outputs, rank, experts).permute(2, 0, 1)


def _exchanges(folder: Path) -> bool:
    """Return whether the folder is of a peft that exchanged inputs and outputs of experts, or does not say."""
    version = re.match(r"(\d+)\.(\d+)", str(read_json(folder / "adapter_config.json").get("peft_version", "")))
    return version is None or (int(version[1]), int(version[2])) < (0, 19)


def _adapted(folder: Path, body: Mapping[str, Any]) -> list[str]:
    """Return the names of what the tensors of the folder adapt: modules, and parameters that stack experts."""
    path = tensors_file(folder)
    with opened(path) as file:
        keys = list(file.keys())
    ends = (".lora_A.weight", ".lora_B.weight")
    unknown = [key for key in keys if not (key.startswith(PREFIX) and key.endswith(ends))]
    if unknown:
        raise CheckpointError(f"{path} holds {unknown[0]!r}, which is not the A or B of a linear layer")
    halves = [{key.removesuffix(end) for key in keys if key.endswith(end)} for end in ends]
    single = sorted(halves[0] ^ halves[1])
    if single:
        raise CheckpointError(f"{path} has no {single[0]}{ends[single[0] in halves[0]]}, the other half of an adapter")
    modules = [key.removeprefix(PREFIX).removesuffix(ends[0]) for key in keys if key.endswith(ends[0])]
    stacked = [str(name) for name in body.get("target_parameters") or []]
    return list(dict.fromkeys(name for module in modules for name in _targets(path, module, stacked)))


def _targets(path: Path, module: str, stacked: Sequence[str]) -> list[str]:
    """Return the targets that a module of the file stands for: itself, or the stacks that peft was asked to adapt."""
    if expert := EXPERT.search(module):
        if expert[1] not in STACKS:
            raise CheckpointError(f"{path}: {module} is a matrix of an expert that has no place in a known stack")
        return [STACKS[expert[1]]]
    holder = module.removesuffix(".base_layer")
    leaves = [name.rpartition(".")[2] for name in stacked if _ends(holder, name.rpartition(".")[0])]
    if not leaves:
        if holder != module:
            raise CheckpointError(f"{path}: {module} is no linear layer, and target_parameters names none of {holder}")
        return [module]
    return [f"{holder}.{leaf}" for leaf in leaves]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}") or not end
