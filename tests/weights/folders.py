"""Whole published folders of toy models, quantized by the writers of `layouts`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.weights import layouts
from tests.zoo import ARCHITECTURES, randomise
from treering.formats import FP8, MXFP4, NVFP4, Format, FP8Block, Integer

Writer = Callable[[str, Tensor], layouts.Folder]


def quantize(folder: Path, writer: Writer, chosen: Callable[[str], bool]) -> Path:
    """Replace the chosen weights of a folder by what `writer` makes of them, and describe it in its JSON files."""
    file = folder / "model.safetensors"
    tensors, config = {}, {}
    for key, weight in load_file(file).items():
        if not chosen(key):
            tensors[key] = weight
            continue
        config, stored = writer(key.removesuffix(".weight"), weight)
        tensors |= {name: tensor.contiguous() for name, tensor in stored.items()}
    assert config, "nothing was chosen"
    save_file(tensors, file, metadata={"format": "pt"})
    if "quantization" in config:
        (folder / "hf_quant_config.json").write_text(json.dumps(config))
    else:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def linears(key: str) -> bool:
    """The linears of attention and MLP, and experts; no routers."""
    return key.endswith("proj.weight")


def wide(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A toy model whose linears have 64 or 128 inputs, which every format can group."""
    config = ARCHITECTURES[arch]()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "moe_intermediate_size": 64}
    for name, size in sizes.items():
        if hasattr(config, name) and not (name == "head_dim" and hasattr(config, "qk_rope_head_dim")):
            setattr(config, name, size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    randomise(model, seed)
    return model.eval()


def published(arch: str, folder: Path, writer: Writer, chosen: Callable[[str], bool] = linears, **how: Any) -> Path:
    """Write a toy model of `arch` as a quantized folder."""
    wide(arch, **how).save_pretrained(folder)
    return quantize(folder, writer, chosen)


def gpt_oss(folder: Path, **how: Any) -> Path:
    """As OpenAI publishes it: experts in mxfp4, outputs before inputs."""

    def writer(name: str, weight: Tensor) -> layouts.Folder:
        return layouts.gpt_oss(name, weight.mT)

    return published("gpt_oss", folder, writer, lambda key: key.endswith(("gate_up_proj", "down_proj")), **how)


def compressed(form: Format) -> Writer:
    """A writer of compressed-tensors."""
    return lambda name, weight: layouts.compressed_tensors(name, weight, form)


WRITERS: dict[str, Writer] = {
    "nvfp4": compressed(NVFP4()),
    "mxfp4": compressed(MXFP4()),
    "w4a16": compressed(Integer(width=4, group=32)),
    "w4a16 bfloat16": compressed(Integer(width=4, group=32, scale_dtype="bfloat16")),
    "w4a16 asymmetric": compressed(Integer(width=4, group=32, asymmetric=True)),
    "int8 tensor": compressed(Integer(width=8, group=-1)),
    "fp8 channel": compressed(FP8(scale_dtype="bfloat16")),
    "fp8 tensor": compressed(FP8(scale="tensor")),
    "fp8 block": compressed(FP8Block(block=16)),
    "deepseek": lambda name, weight: layouts.deepseek(name, weight, block=16),
    "modelopt nvfp4": lambda name, weight: layouts.modelopt(name, weight, NVFP4(convention="multiply")),
    "modelopt fp8": lambda name, weight: layouts.modelopt(name, weight, FP8(scale="tensor")),
    "modelopt w4a16": lambda name, weight: layouts.modelopt(name, weight, Integer(group=32)),
    "bitsandbytes": lambda name, weight: layouts.bitsandbytes(name, weight),
    "bitsandbytes plain": lambda name, weight: layouts.bitsandbytes(name, weight, nested=False, storage=torch.bfloat16),
}
