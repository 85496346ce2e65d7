"""Folders of modelopt: NVFP4, FP8, int8 channels and int4 groups, as the tensors of each weight say."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import FP8, Integer
from treering.formats.bits import as_bytes, pack_stream
from treering.weights.quantized.weight import DTYPES, PieceReader, QuantizedWeight, Read, Shapes, need, nvfp4_pieces


def modelopt(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> Iterator[QuantizedWeight]:
    """NVFP4, FP8 (tensor or channel), int8 channels, and int4 groups: which, the tensors of each weight say."""
    quantization = config.get("quantization", config)
    algorithm = str(quantization.get("quant_algo"))
    if scaled := next((key for key in shapes if key.endswith("pre_quant_scale")), None):
        raise CheckpointError(
            f"{folder}: {scaled} scales the inputs of a quantized weight (AWQ, SmoothQuant, SVDQuant), which is not "
            "done here. Take a folder without it, or the unquantized model"
        )
    readers: dict[str, PieceReader]
    for key, (dtype, shape) in shapes.items():
        module, _, leaf = key.rpartition(".")
        scale = f"{module}.weight_scale"
        if leaf != "weight" or dtype not in ("U8", "F8_E4M3", "I8"):
            continue
        need(shapes, scale, key, folder)
        kind, scale_shape = shapes[scale]
        if dtype == "U8" and kind == "F8_E4M3":
            form, keys, readers = nvfp4_pieces(module, "weight", "weight_scale_2", "multiply", shapes, read, folder)
            yield QuantizedWeight(name=key, shape=(shape[0], 2 * shape[1]), form=form, keys=keys, readers=readers)
        elif dtype == "U8" and kind in ("F32", "BF16", "F16") and len(scale_shape) == 2:
            rows, columns = 2 * shape[0], shape[1]
            form = Integer(width=4, group=columns // scale_shape[1], scale_dtype=DTYPES[kind])

            def int4(rows: slice, key: str = key) -> Tensor:
                first = rows.start // 2
                packed = read(key, slice(first, -(-rows.stop // 2)))  # rows in pairs, the even one in the low half
                codes = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1) ^ 8  # were two's complement
                return pack_stream(codes[rows.start - 2 * first : rows.stop - 2 * first], 4)

            def group_scales(rows: slice, scale: str = scale) -> Tensor:
                return as_bytes(read(scale, rows))

            readers = {"codes": int4, "scales": group_scales}
            yield QuantizedWeight(name=key, shape=(rows, columns), form=form, keys=(key, scale), readers=readers)
        elif dtype in ("F8_E4M3", "I8") and kind in ("F32", "BF16", "F16") and len(scale_shape) <= 1:
            channel = scale_shape == (shape[0],) and shape[0] > 1
            form = (
                FP8(scale="channel" if channel else "tensor", scale_dtype=DTYPES[kind])
                if dtype == "F8_E4M3"
                else Integer(width=8, group=0 if channel else -1, scale_dtype=DTYPES[kind])
            )

            def eight(rows: slice, key: str = key, bias: int = 0x80 if dtype == "I8" else 0) -> Tensor:
                return as_bytes(read(key, rows)) ^ bias

            def row_scales(rows: slice, scale: str = scale) -> Tensor:
                return as_bytes(read(scale).reshape(-1, 1))[rows]

            readers = {"codes": eight, "scales": row_scales}
            yield QuantizedWeight(name=key, shape=shape, form=form, keys=(key, scale), readers=readers)
        else:
            raise CheckpointError(
                f"{folder}: {key} ({dtype}) with scales {kind} {list(scale_shape)} is no format of modelopt that is "
                f"read here (quant_algo {algorithm}): NVFP4, FP8, W8A16 and W4A16 are"
            )
