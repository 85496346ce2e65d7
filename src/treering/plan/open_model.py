"""Opens a folder, a hub name or a live model: a model on the meta device, and a lazy source of its plain tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from treering.core.errors import CheckpointError, PlanError
from treering.core.seeds import derive
from treering.store.untrusted import check_folder, first_line
from treering.technique import LazyTensor
from treering.weights.plain_tensors import Source, from_folder, from_model, keep_wide
from treering.weights.quantized.folder import QuantizedFolder
from treering.weights.quantized.opened import IN_CONFIG, open_quantized, quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Dropout = Literal["refuse", "off", "per_rank"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
NEEDED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")  # no pickles, no code


def locate(path: str) -> Path:
    """Return the folder `path`, or a local copy of the hub's model of that name."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise CheckpointError(
            f"{path} is not a folder; give the path of a Hugging Face folder or a hub name (owner/model)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(NEEDED)))
    except Exception as error:  # the hub client raises many classes; each means that there is no model
        raise CheckpointError(
            f"{path} is neither a folder here nor available from the hub ({first_line(error)}); check the name, the "
            "network and, for a gated model, your access token"
        ) from None


def on_meta(folder: Path, dtype: str) -> "PreTrainedModel":
    """Return the model that the folder's config describes, without memory."""
    config = read_config(folder)
    chosen = _dtype(config, dtype)
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen)
    except Exception as error:  # raised by a model's constructor for numbers that do not fit together
        raise CheckpointError(
            f"{folder}/config.json describes no model that can be built: {first_line(error)}"
        ) from None
    keep_wide(model, chosen)
    if (folder / "generation_config.json").is_file():  # it names the tokens that end a turn
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"{folder}/generation_config.json cannot be used: {first_line(error)}") from None
    return model


def _dtype(config: "PretrainedConfig", dtype: str) -> torch.dtype:
    stored: Any = config.dtype or torch.float32
    if dtype != "auto":
        return named_dtype(dtype)
    if str(stored).removeprefix("torch.") not in DTYPES:
        raise PlanError(
            f"config.json has dtype {str(stored).removeprefix('torch.')}, in which no model is trained; set "
            "model.dtype to bfloat16 or float32",
            settings=("model.dtype",),
        )
    return stored


def named_dtype(name: str) -> torch.dtype:
    """Return the dtype called `name`, or raise PlanError."""
    if name not in DTYPES:
        raise PlanError(f"dtype is {name!r}; write auto or one of {', '.join(DTYPES)}", settings=("model.dtype",))
    return getattr(torch, name)


def read_config(folder: Path) -> "PretrainedConfig":
    """Return the config of a folder, without how its weights are quantized; raise an error for one that cannot be read
    or trained."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; it is not a Hugging Face model folder")
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its validators raise various classes
        raise CheckpointError(f"{folder}/config.json cannot be used: {first_line(error)}") from None
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        raise CheckpointError(f"{folder}/config.json: dtype is {str(config.dtype)[:80]!r}, which is not a dtype")
    for one in (config, config.get_text_config()):
        for key in IN_CONFIG:  # transformers would replace modules; the weights are read by `quantized_weights`
            if hasattr(one, key):
                delattr(one, key)
    refuse_router_loss(config)
    return config


def refuse_router_loss(config: "PretrainedConfig") -> None:
    """Raise PlanError for a model that asks for the auxiliary loss of its router."""
    if any(getattr(one, "output_router_logits", False) for one in (config, config.get_text_config())):
        raise PlanError(
            "the config asks for the router's auxiliary loss (output_router_logits), which transformers computes over "
            "a complete batch: it would depend on how a batch is cut. Set output_router_logits to false"
        )


def initialised(folder: Path, dtype: str, seed: int) -> "PreTrainedModel":
    """Return a model with random weights from the folder's config, the same on every rank."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    chosen = _dtype(config, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialise"))
        model = AutoModelForCausalLM.from_config(config, dtype=chosen)
    keep_wide(model, chosen)
    return model


def quantized_weights(folder: Path, *, decode: bool) -> QuantizedFolder | None:
    """Return the quantized weights of a folder, None if it has none. PlanError if there are none to `decode`."""
    quantized = open_quantized(folder)
    if decode and quantized is None:
        raise PlanError(
            f"model.dequantize is set, and {folder} holds no quantized weights; leave it out",
            settings=("model.dequantize",),
        )
    return quantized


def source_of(
    model: "PreTrainedModel", folder: Path | None, quantized: QuantizedFolder | None = None, *, keep: bool = True
) -> Source:
    """Return the plain tensors of `folder` for `model`, or those of the live model.

    Args:
        quantized: the quantized weights of the folder.
        keep: whether these are given as they are stored, besides decoded.
    """
    return from_model(model) if folder is None else from_folder(model, folder, quantized, keep=keep)


def unquantized(path: str) -> Mapping[str, LazyTensor]:
    """Return the plain tensors of a folder or a hub's model, by plain name; PlanError where they are quantized."""
    folder = locate(path)
    if quantization(folder) is not None:
        raise PlanError(f"{path} holds quantized weights; name the folder of the unquantized model")
    return source_of(on_meta(folder, "auto"), folder).tensors


def quiet_dropout(model: nn.Module, mode: Dropout) -> None:
    """Refuse dropout, or set it to 0.

    Each rank draws it from another generator, so that gradients depend on how a batch is distributed over ranks.
    """
    if mode == "per_rank":
        return
    active = []
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            named = any(word in attribute for word in ("dropout", "jitter", "layerdrop"))
            noisy = named or (isinstance(module, nn.Dropout) and attribute == "p")
            if noisy and isinstance(value, float) and value > 0:
                active.append(f"{name}.{attribute} = {value}")
                if mode == "off":
                    setattr(module, attribute, 0.0)
    if active and mode == "refuse":
        raise PlanError(
            f"the model has dropout ({active[0]}, and {len(active) - 1} more), which makes results depend on the "
            "number of ranks. Choose model.dropout: off (set it to 0) or per_rank (keep it)",
            settings=("model.dropout",),
        )
