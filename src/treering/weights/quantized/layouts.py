"""Layouts of quantized weights in folders that are written: compressed-tensors, gpt-oss, DeepSeek, bitsandbytes.

Codes and scales are the bytes of the format; only names, dtypes and shapes are the layout's. What a layout cannot hold
exactly is refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from treering.formats import FP8, MXFP4, NF4, NVFP4, Format, FP8Block, Integer
from treering.formats.bits import from_bytes, pack_stream, row_bytes
from treering.formats.layout import Tensors
from treering.formats.nf4 import TABLE, nested_map

DESCRIPTION = 320  # bytes for bitsandbytes' JSON, filled with spaces: the size must be known before the values are


class FolderLayout(Protocol):
    """A layout of quantized weights. `key` is the name that a weight would have in the folder unquantized."""

    def refusal(self, form: Format, shape: tuple[int, ...]) -> str:
        """Return why a weight [..., outputs, inputs] cannot be written, or the empty string."""
        ...

    def tensors(self, key: str, form: Format, packed: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the folder's tensors of one weight; on the meta device their shapes and dtypes."""
        ...

    def config(self, forms: Mapping[str, Format], plain: Sequence[str]) -> dict[str, Any]:
        """Return `quantization_config`.

        Args:
            forms: by the key of each quantized weight.
            plain: the modules of linear layers that are not quantized.
        """
        ...


class CompressedTensors:
    """`X.weight_packed` or `X.weight`, `X.weight_scale`, …: nvfp4, mxfp4, packed integers, int8 and fp8."""

    def refusal(self, form: Format, shape: tuple[int, ...]) -> str:
        if len(shape) != 2:
            return "compressed-tensors holds matrices, and the model's files hold a stack of experts as one tensor"
        if isinstance(form, NVFP4) and form.convention != "divide":
            return "its global scale multiplies (modelopt), and that of compressed-tensors divides, with other values"
        if isinstance(form, NVFP4) and form.parts != 1:
            return "it has several global scales, and compressed-tensors holds one"
        if isinstance(form, NF4):
            return "compressed-tensors has no nf4"
        if isinstance(form, Integer) and form.width % 2 and _words(form.width, shape[1]):
            return f"rows of {shape[1]} codes of {form.width} bits can be read in two ways (before and since 0.18)"
        return ""

    def tensors(self, key: str, form: Format, packed: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
        leaves = self._leaves(form, packed, shape)
        return {f"{key.removesuffix('weight')}{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()}

    def _leaves(self, form: Format, packed: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
        codes, scales = packed["codes"], packed["scales"]
        if isinstance(form, NVFP4):
            return {
                "weight_packed": codes,
                "weight_scale": from_bytes(scales, torch.float8_e4m3fn),
                "weight_global_scale": from_bytes(packed["global"], torch.float32).flatten(),
            }
        if isinstance(form, MXFP4):
            return {"weight_packed": codes, "weight_scale": scales}
        assert isinstance(form, FP8 | FP8Block | Integer)
        scale = from_bytes(scales, form.dtype)
        scale = scale.flatten() if scale.numel() == 1 and _strategy(form) == "tensor" else scale
        if not isinstance(form, Integer):
            return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        if _is_int8(form):  # two's complement instead of a bias
            return {"weight": (codes ^ 0x80)[..., : shape[1]].view(torch.int8), "weight_scale": scale}
        leaves = {
            "weight_packed": from_bytes(codes, torch.int32),
            "weight_scale": scale,
            "weight_shape": torch.tensor(shape, device=None if not codes.is_meta else "meta"),
        }
        if form.asymmetric:  # packed along the rows, unlike the codes
            zeros = from_bytes(packed["zeros"], torch.int8).to(torch.int16) + (1 << form.width - 1)
            words = from_bytes(pack_stream(zeros.mT.to(torch.uint8), form.width), torch.int32)
            leaves["weight_zero_point"] = words.mT
        return leaves

    def config(self, forms: Mapping[str, Format], plain: Sequence[str]) -> dict[str, Any]:
        kinds: dict[str, tuple[Format, list[str]]] = {}
        for key, form in forms.items():
            kinds.setdefault(str(form), (form, []))[1].append(key.removesuffix(".weight"))
        groups: dict[str, Any] = {}
        for number, (form, modules) in enumerate(kinds.values()):
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else modules,
                "format": _ct_format(form),
                "weights": _arguments(form),
                "input_activations": None,
                "output_activations": None,
            }
        names = [_ct_format(form) for form, _ in kinds.values()]
        return {
            "quant_method": "compressed-tensors",
            "format": names[0] if len(set(names)) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": list(plain),
            "config_groups": groups,
        }


class GptOss:
    """`X_blocks` and `X_scales` of stacks of experts in mxfp4, as OpenAI publishes gpt-oss."""

    def refusal(self, form: Format, shape: tuple[int, ...]) -> str:
        if len(shape) != 3:
            return "gpt-oss is published with quantized experts only"
        return "" if isinstance(form, MXFP4) else "gpt-oss' experts are published in mxfp4 only"

    def tensors(self, key: str, form: Format, packed: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
        blocks = packed["codes"].unflatten(-1, (-1, MXFP4.group // 2))
        return {f"{key}_blocks": blocks.contiguous(), f"{key}_scales": packed["scales"].contiguous()}

    def config(self, forms: Mapping[str, Format], plain: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(plain)}


class DeepSeek:
    """`X.weight` and `X.weight_scale_inv`, which multiplies: fp8 with float32 scales of blocks."""

    def __init__(self, block: int):
        self.block = block

    def refusal(self, form: Format, shape: tuple[int, ...]) -> str:
        return "" if len(shape) == 2 else "the model's files hold a stack of experts as one tensor"

    def tensors(self, key: str, form: Format, packed: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
        scales = from_bytes(packed["scales"], torch.float32)
        return {key: packed["codes"].contiguous().view(torch.float8_e4m3fn), f"{key}_scale_inv": scales.contiguous()}

    def config(self, forms: Mapping[str, Format], plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [self.block, self.block],
            "modules_to_not_convert": list(plain),
        }


class BitsAndBytes:
    """`X.weight` with the codes of the flattened matrix, `X.weight.absmax` and others: nf4."""

    def __init__(self, dtype: str):
        self.dtype = dtype  # of the unquantized weights: that to which the library decodes

    def refusal(self, form: Format, shape: tuple[int, ...]) -> str:
        if not isinstance(form, NF4):
            return f"bitsandbytes has no {form.label}"
        return "" if len(shape) == 2 else "bitsandbytes leaves stacks of experts unquantized"

    def tensors(self, key: str, form: Format, packed: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
        assert isinstance(form, NF4)
        codes, scales = packed["codes"], packed["scales"]
        state: dict[str, Any] = {
            "quant_type": "nf4", "blocksize": form.block, "dtype": self.dtype, "shape": list(shape)
        }  # fmt: skip
        tensors = {"": codes.reshape(-1, 1), ".quant_map": torch.tensor(TABLE)}
        if form.nested:
            offset = 0.0 if codes.is_meta else from_bytes(packed["offset"], torch.float32).item()
            state |= {"nested_blocksize": form.nested_block, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {".absmax": scales.flatten(), ".nested_quant_map": torch.tensor(nested_map())}
            tensors[".nested_absmax"] = from_bytes(packed["nested"], torch.float32).flatten()
        else:
            tensors[".absmax"] = from_bytes(scales, torch.float32).flatten()
        text = json.dumps(state).encode()
        assert len(text) <= DESCRIPTION, text
        tensors[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(text.ljust(DESCRIPTION)), dtype=torch.uint8)
        return {f"{key}{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}

    def config(self, forms: Mapping[str, Format], plain: Sequence[str]) -> dict[str, Any]:
        nested = any(isinstance(form, NF4) and form.nested for form in forms.values())
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(plain),
        }


def _is_int8(form: Integer) -> bool:
    return form.width == 8 and form.group <= 0 and not form.asymmetric


def _words(width: int, columns: int) -> bool:
    """Return whether rows have as many 32-bit words as before compressed-tensors 0.18, with codes in other places."""
    return row_bytes(columns, width) // 4 == -(-columns // (32 // width)) and columns > 32 // width


def _ct_format(form: Format) -> str:
    if isinstance(form, NVFP4 | MXFP4):
        return f"{form.name}-pack-quantized"
    if isinstance(form, FP8 | FP8Block):
        return "float-quantized"
    return "int-quantized" if isinstance(form, Integer) and _is_int8(form) else "pack-quantized"


def _strategy(form: Format) -> str:
    if isinstance(form, FP8Block):
        return "block"
    if isinstance(form, FP8):
        return form.scale
    return {0: "channel", -1: "tensor"}.get(form.group, "group") if isinstance(form, Integer) else "group"


def _arguments(form: Format) -> dict[str, Any]:
    """Return `weights` of a group of the config."""
    common: dict[str, Any] = {"symmetric": True, "dynamic": False, "strategy": _strategy(form)}
    if isinstance(form, NVFP4):
        common |= {"strategy": "tensor_group", "group_size": form.group, "scale_dtype": "torch.float8_e4m3fn"}
        return common | {"num_bits": 4, "type": "float"}
    if isinstance(form, MXFP4):
        return common | {"num_bits": 4, "type": "float", "group_size": form.group, "scale_dtype": "torch.uint8"}
    if isinstance(form, FP8 | FP8Block):
        block = {"block_structure": [form.block, form.block]} if isinstance(form, FP8Block) else {}
        return common | {"num_bits": 8, "type": "float"} | block
    assert isinstance(form, Integer)
    group = {"group_size": form.group} if form.group > 0 else {}
    return common | {"num_bits": form.width, "type": "int", "symmetric": not form.asymmetric} | group
