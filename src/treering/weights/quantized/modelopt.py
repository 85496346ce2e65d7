"""Folders of modelopt: NVFP4, FP8, int8 channels and int4 groups, as the tensors of each weight say."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import FP8, Integer
from treering.formats.bits import as_bytes, pack_stream
from treering.weights.quantized.weight import DTYPES, QuantizedWeight, Read, Shapes, need, nvfp4_pieces


def modelopt(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> Iterator[QuantizedWeight]:
    """NVFP4, FP8 (tensor or channel), int8 channels, and int4 groups: which, the tensors of each weight say."""
    quantization = config.get("quantization", config)
    algorithm = str(quantization.get("quant_algo"))
    if scaled := next((key for key in shapes if key.endswith("pre_quant_scale")), None):
        raise CheckpointError(
            f"{folder}: {scaled} scales the inputs of a quantized weight (AWQ, SmoothQuant, SVDQuant), which is not "
            "done here. Take a folder without it, or the unquantized model"
        )
    for key, (dtype, shape) in shapes.items():
        module, _, leaf = key.rpartition(".")
        scale = f"{module}.weight_scale"
        if leaf != "weight" or dtype not in ("U8", "F8_E4M3", "I8"):
            continue
        need(shapes, scale, key, folder)
        kind, scale_shape = shapes[scale]
        if dtype == "U8" and kind == "F8_E4M3":
            form, keys, pieces = nvfp4_pieces(module, "weight", "weight_scale_2", "multiply", shapes, read, folder)
            yield QuantizedWeight(name=key, shape=(shape[0], 2 * shape[1]), form=form, keys=keys, pieces=pieces)
        elif dtype == "U8" and kind in ("F32", "BF16", "F16") and len(scale_shape) == 2:
            rows, columns = 2 * shape[0], shape[1]
            form = Integer(width=4, group=columns // scale_shape[1], scale_dtype=DTYPES[kind])

            def int4(key: str = key, scale: str = scale) -> dict[str, Tensor]:
                packed = read(key)  # rows in pairs, the even one in the low half, two's complement
                codes = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1) ^ 8
                return {"codes": pack_stream(codes, 4), "scales": as_bytes(read(scale))}

            yield QuantizedWeight(name=key, shape=(rows, columns), form=form, keys=(key, scale), pieces=int4)
        elif dtype in ("F8_E4M3", "I8") and kind in ("F32", "BF16", "F16") and len(scale_shape) <= 1:
            channel = scale_shape == (shape[0],) and shape[0] > 1
            form = (
                FP8(scale="channel" if channel else "tensor", scale_dtype=DTYPES[kind])
                if dtype == "F8_E4M3"
                else Integer(width=8, group=0 if channel else -1, scale_dtype=DTYPES[kind])
            )

            def eight(key: str = key, scale: str = scale, integer: bool = dtype == "I8") -> dict[str, Tensor]:
                codes = as_bytes(read(key))
                return {"codes": codes ^ 0x80 if integer else codes, "scales": as_bytes(read(scale).reshape(-1, 1))}

            yield QuantizedWeight(name=key, shape=shape, form=form, keys=(key, scale), pieces=eight)
        else:
            raise CheckpointError(
                f"{folder}: {key} ({dtype}) with scales {kind} {list(scale_shape)} is no format of modelopt that is "
                f"read here (quant_algo {algorithm}): NVFP4, FP8, W8A16 and W4A16 are"
            )
