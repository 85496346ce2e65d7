"""Refuses a folder of quantized tensors that its config.json does not declare: codes are not weights without scales."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from torch import Tensor

from treering.core.errors import CheckpointError
from treering.store.untrusted import Header

REAL = ("F64", "F32", "F16", "BF16")
DEQUANTIZE = (
    "Take the model in bfloat16 or float32, or make it from the quantized one with transformers "
    "(from_pretrained(…, quantization_config=…), dequantize(), save_pretrained)"
)
# What quantizers call the tensors that belong to a quantized weight: `weight_scale_inv`, `SCB`, `weight.absmax`, …
_QUANTIZER_TENSOR = re.compile(
    r"(?P<of>.+?)[._](?P<what>(weight_)?(scales?|scale_inv|scale_2|global_scale|zero_points?|zeros|qzeros|packed|blocks|shape)"
    r"|scale_weight|(nested_)?absmax|(nested_)?quant_map|quant_state\..+|SCB|weight_format|g_idx|qweight)"
)


def refuse_codes(
    folder: Path, headers: Mapping[str, tuple[Path, Header]], keys: Sequence[str], name: str, like: Tensor
) -> None:
    """Refuse integers and eight-bit floats: a quantizer's codes are another weight without their scales."""
    if not like.is_floating_point():
        return
    for key in keys:
        file, header = headers[key]
        if header.dtype not in REAL:
            raise CheckpointError(
                f"{file}: {key} is stored as {header.dtype}, and the model's {name} is floating-point. These look like "
                f"codes of a quantized weight, {folder}/config.json has no quantization_config that describes "
                f"them, and training them as if they were weights would be wrong. {DEQUANTIZE}"
            )


def refuse_scales(folder: Path, used: AbstractSet[str], unused: Sequence[str]) -> None:
    """Refuse scales of a weight that the model does not have: nothing would multiply by them."""
    for key in unused:
        match = _QUANTIZER_TENSOR.fullmatch(key)
        weight = next((w for w in (match["of"], f"{match['of']}.weight") if w in used), None) if match else None
        if weight is not None:
            raise CheckpointError(
                f"{folder}: {key} looks like a scale of the quantized weight {weight}, and the model has no place for "
                f"it, so that {weight} would be trained without it. {DEQUANTIZE}. If the weights are multiplied by "
                "their scales already, remove the scales from the folder"
            )


def refuse_packed(
    folder: Path, headers: Mapping[str, tuple[Path, Header]], missing: str, unused: Sequence[str]
) -> None:
    """Refuse a weight that exists in packed form only, with another message than for an incomplete folder."""
    packed = [key for key in unused if _QUANTIZER_TENSOR.fullmatch(key)]
    codes = [key for key in packed if headers[key][1].dtype not in REAL]
    if codes:
        raise CheckpointError(
            f"{folder} has no tensor for {missing}; it contains quantized weights, such as {codes[0]} "
            f"({headers[codes[0]][1].dtype}). {DEQUANTIZE}"
        )
