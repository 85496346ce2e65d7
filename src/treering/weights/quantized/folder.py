"""Published folders with quantized weights: which tensors of the files are one weight, and in which number format.

Codes and scales are taken as they are: nothing is decoded and encoded again. transformers is not asked, as it opens
some of these folders as other weights without an error.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from treering.core.errors import CheckpointError
from treering.weights.quantized.compressed import compressed
from treering.weights.quantized.modelopt import modelopt
from treering.weights.quantized.published import bitsandbytes, deepseek, gpt_oss
from treering.weights.quantized.weight import QuantizedWeight, Read, Shapes


@dataclass(frozen=True, kw_only=True)
class QuantizedFolder:
    """The quantized weights of a folder.

    Attributes:
        weights: by name.
        ignored: the stored tensors that describe activations only.
        activations: whether the folder's config asks for quantized activations.
    """

    weights: Mapping[str, QuantizedWeight]
    ignored: tuple[str, ...] = ()
    activations: bool = False

    def notes(self, decoded: torch.dtype | None = None) -> tuple[str, ...]:
        """Return messages for the user.

        Args:
            decoded: the dtype to which all weights are decoded; None: they stay as they are stored.
        """
        kinds = count(weight.form.label for weight in self.weights.values())
        notes = [f"{len(self.weights)} weights stay as the folder stores them: {kinds}"]
        if decoded is not None:
            elements = sum(math.prod(weight.shape) for weight in self.weights.values())
            bits = sum(w.form.bits(*w.shape[-2:]) * math.prod(w.shape) for w in self.weights.values())
            kind = str(decoded).removeprefix("torch.")
            notes = [
                f"{len(self.weights)} quantized weights ({kinds}) are decoded to {kind}: "
                f"{elements * decoded.itemsize / 2**20:,.1f} MiB, and {bits / 8 / 2**20:,.1f} MiB as they are stored"
            ]
        if self.ignored:
            notes.append(
                f"{len(self.ignored)} tensors of the folder are ignored: "
                f"{count(key.rpartition('.')[2] for key in self.ignored)}; they scale quantized activations, and "
                "activations are not quantized here"
            )
        elif self.activations:
            notes.append("the folder also describes quantized activations, which are not quantized here")
        return tuple(notes)


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
            f"{', '.join(readers)}. Take the unquantized model and let techniques.quantize quantize it"
        )
    weights = {w.name: w for w in readers[method](config, shapes, read, folder)}
    if not weights:
        raise CheckpointError(
            f"{folder}: config.json says that weights are quantized ({method}), and none of its tensors is; the folder "
            "is incomplete, or its config.json belongs to another one"
        )
    ignored = tuple(key for key in shapes if ACTIVATIONS.fullmatch(key))
    return QuantizedFolder(weights=weights, ignored=ignored, activations=_quantizes_activations(config))


def count(names: Iterable[str]) -> str:
    """Return how often each name occurs, as text: `nvfp4 (12), fp8 (2)`."""
    return ", ".join(f"{name} ({number})" for name, number in Counter(names).items())


def _quantizes_activations(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups") or {}
    return any(isinstance(g, Mapping) and g.get("input_activations") for g in groups.values())
