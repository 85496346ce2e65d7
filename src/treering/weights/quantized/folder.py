"""Published folders with quantized weights: which tensors of the files are one weight, and in which number format.

Codes and scales are taken as they are: nothing is decoded and encoded again. transformers is not asked, as it opens
some of these folders as other weights without an error.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from treering.core.errors import CheckpointError
from treering.formats import Integer
from treering.weights.quantized.compressed import compressed
from treering.weights.quantized.modelopt import modelopt
from treering.weights.quantized.published import bitsandbytes, deepseek, gpt_oss
from treering.weights.quantized.weight import QuantizedWeight, Read, Shapes


@dataclass(frozen=True, kw_only=True)
class QuantizedFolder:
    """The quantized weights of a folder by name, the tensors that describe activations only, and notes for users."""

    weights: Mapping[str, QuantizedWeight]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


REFUSED = {
    "gptq": "GPTQ's order of groups",
    "awq": "AWQ's scales of activations",
    "aqlm": "AQLM's codebooks",
    "quip": "QuIP's rotations",
    "eetq": "EETQ's layout",
    "hqq": "HQQ's layout",
    "vptq": "VPTQ's codebooks",
    "bitnet": "BitNet's ternary weights",
    "torchao": "torchao's tensor classes, which are stored as pickles",
    "quanto": "quanto's layout",
}
ACTIVATIONS = re.compile(r".+\.(input_scale|input_global_scale|output_scale|k_scale|v_scale|q_scale)")


def read_quantized(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> QuantizedFolder:
    """Return the quantized weights of a folder.

    Args:
        config: `quantization_config` of its config.json, or the content of modelopt's hf_quant_config.json.
        shapes: what the headers of its files say.
        read: reads one stored tensor.
        folder: for messages.
    """
    method = str(config.get("quant_method") or ("modelopt" if "quantization" in config else "")).lower()
    readers = {
        "mxfp4": gpt_oss,
        "fp8": deepseek,
        "compressed-tensors": compressed,
        "modelopt": modelopt,
        "bitsandbytes": bitsandbytes,
    }
    if method not in readers:
        why = REFUSED.get(method, "this way of quantizing")
        raise CheckpointError(
            f"{folder}: quant_method is {method or 'not given'!r}, and {why} cannot be read here. What can: "
            f"{', '.join(readers)}. Take the unquantized model and quantize it: treering quantize MODEL --format nvfp4"
        )
    weights = {w.name: w for w in readers[method](config, shapes, read, folder)}
    if not weights:
        raise CheckpointError(
            f"{folder}: config.json says that weights are quantized ({method}), and none of its tensors is; the folder "
            "is incomplete, or its config.json belongs to another one"
        )
    ignored = tuple(key for key in shapes if ACTIVATIONS.fullmatch(key))
    notes: tuple[str, ...] = (f"{len(weights)} weights stay as the folder stores them: {_kinds(weights.values())}",)
    if ignored or _quantizes_activations(config):
        notes += ("the folder also describes quantized activations, which are not quantized here",)
    return QuantizedFolder(weights=weights, ignored=ignored, notes=notes)


def _kinds(weights: Iterable[QuantizedWeight]) -> str:
    counts: dict[str, int] = {}
    for weight in weights:
        name = f"int{weight.form.width}" if isinstance(weight.form, Integer) else weight.form.name
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _quantizes_activations(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups") or {}
    return any(isinstance(g, Mapping) and g.get("input_activations") for g in groups.values())
