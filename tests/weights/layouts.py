"""Writes quantized weights as their publishers do, from the description of each layout and not with our readers."""

import json

import torch
from torch import Tensor

from treering.formats import FP8, MXFP4, NF4, NVFP4, Format, FP8Block, Integer
from treering.formats.bits import pack_stream
from treering.formats.nf4 import TABLE, nested_map

Folder = tuple[dict, dict[str, Tensor]]  # quantization_config, tensors


def codes_of(form: Integer, packed: dict[str, Tensor], columns: int) -> Tensor:
    """Signed values, read bit by bit."""
    bits = (packed["codes"][..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    stream = bits.flatten(-2)[:, : columns * form.width].unflatten(-1, (columns, form.width)).long()
    return (stream << torch.arange(form.width)).sum(-1) - (1 << form.width - 1)


def by_words(values: Tensor, width: int) -> Tensor:
    """32 // width values to a 32-bit word, biased."""
    each = 32 // width
    biased = torch.nn.functional.pad(values + (1 << width - 1), (0, -values.shape[-1] % each)).unflatten(-1, (-1, each))
    words = (biased << (torch.arange(each) * width)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def floats(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.contiguous().view(dtype)


def compressed_tensors(name: str, weight: Tensor, form: Format, *, older: bool = False) -> Folder:
    packed = form.encode(weight)
    scales = packed["scales"]
    config = {"symmetric": True}
    if isinstance(form, NVFP4):
        config |= {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
        tensors = {"weight_packed": packed["codes"], "weight_scale": floats(scales, torch.float8_e4m3fn)}
        tensors["weight_global_scale"] = floats(packed["global"], torch.float32).flatten()
    elif isinstance(form, MXFP4):
        config |= {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32}
        tensors = {"weight_packed": packed["codes"], "weight_scale": scales}
    elif isinstance(form, FP8):
        config |= {"type": "float", "num_bits": 8, "strategy": form.scale}
        tensors = {"weight": floats(packed["codes"], torch.float8_e4m3fn), "weight_scale": floats(scales, form.dtype)}
        if form.scale == "tensor":
            tensors["weight_scale"] = tensors["weight_scale"].flatten()
    elif isinstance(form, FP8Block):
        config |= {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [form.block] * 2}
        tensors = {"weight": floats(packed["codes"], torch.float8_e4m3fn), "weight_scale": floats(scales, form.dtype)}
    else:
        assert isinstance(form, Integer)
        strategy = {0: "channel", -1: "tensor"}.get(form.group, "group")
        config |= {"type": "int", "num_bits": form.width, "strategy": strategy, "symmetric": not form.asymmetric}
        config |= {"group_size": form.group if form.group > 0 else None}
        values = codes_of(form, packed, weight.shape[1])
        tensors = {"weight_scale": floats(scales, form.dtype)}
        if form.width == 8 and not form.asymmetric and not older:
            tensors["weight"] = values.to(torch.int8)
        else:
            stream = packed["codes"].contiguous().view(torch.int32)
            tensors["weight_packed"] = by_words(values, form.width) if older else stream
            tensors["weight_shape"] = torch.tensor(weight.shape)
            if form.asymmetric:
                zeros = floats(packed["zeros"], torch.int8).long()
                biased = (zeros.T + (1 << form.width - 1)).to(torch.uint8)
                stream = pack_stream(biased, form.width).view(torch.int32)
                tensors["weight_zero_point"] = (by_words(zeros.T, form.width) if older else stream).T
    group = {"targets": ["Linear"], "weights": config, "input_activations": None}
    whole = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return whole, {f"{name}.{leaf}": t for leaf, t in tensors.items()}


def gpt_oss(name: str, weight: Tensor) -> Folder:
    """`weight` [E, outputs, inputs]."""
    packed = MXFP4().encode(weight)
    blocks = packed["codes"].unflatten(-1, (-1, 16))
    return {"quant_method": "mxfp4"}, {f"{name}_blocks": blocks, f"{name}_scales": packed["scales"]}


def deepseek(name: str, weight: Tensor, block: int = 128) -> Folder:
    packed = FP8Block(block=block).encode(weight)
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    codes, scales = floats(packed["codes"], torch.float8_e4m3fn), floats(packed["scales"], torch.float32)
    return config, {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}


def modelopt(name: str, weight: Tensor, form: Format) -> Folder:
    packed = form.encode(weight)
    if isinstance(form, NVFP4):
        tensors = {"weight": packed["codes"], "weight_scale": floats(packed["scales"], torch.float8_e4m3fn)}
        tensors |= {"weight_scale_2": floats(packed["global"], torch.float32).squeeze(), "input_scale": torch.ones(())}
        algorithm = "NVFP4"
    elif isinstance(form, FP8):
        scales = floats(packed["scales"], form.dtype).flatten()
        scales = scales.squeeze() if form.scale == "tensor" else scales
        tensors = {"weight": floats(packed["codes"], torch.float8_e4m3fn), "weight_scale": scales}
        algorithm = "FP8" if form.scale == "tensor" else "FP8_PER_CHANNEL_PER_TOKEN"
    else:
        assert isinstance(form, Integer) and form.width == 4
        values = codes_of(form, packed, weight.shape[1]) & 15
        pairs = (values[0::2] | (values[1::2] << 4)).to(torch.uint8)  # of rows
        tensors = {"weight": pairs, "weight_scale": floats(packed["scales"], form.dtype)}
        algorithm = "W4A16_AWQ"
    config = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]},
    }
    return config, {f"{name}.{leaf}": t for leaf, t in tensors.items()}


def bitsandbytes(name: str, weight: Tensor, *, nested: bool = True, storage: torch.dtype = torch.uint8) -> Folder:
    packed = NF4(nested=nested).encode(weight)
    codes = packed["codes"].flatten().view(storage)[:, None]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {"weight": codes, "weight.quant_map": torch.tensor(TABLE)}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = floats(packed["offset"], torch.float32).item()
        tensors |= {"weight.absmax": packed["scales"].flatten(), "weight.nested_quant_map": torch.tensor(nested_map())}
        tensors["weight.nested_absmax"] = floats(packed["nested"], torch.float32).flatten()
    else:
        tensors["weight.absmax"] = floats(packed["scales"], torch.float32).flatten()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = text
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return config, {f"{name}.{leaf}": t for leaf, t in tensors.items()}
