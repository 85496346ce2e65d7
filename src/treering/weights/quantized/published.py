"""Folders of one publisher each: gpt-oss' experts in mxfp4, DeepSeek's fp8 blocks, bitsandbytes' nf4."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import MXFP4, NF4, FP8Block
from treering.formats.bits import as_bytes
from treering.formats.nf4 import TABLE, nested_map
from treering.store.untrusted.files import parse_json
from treering.weights.quantized.weight import PieceReader, QuantizedWeight, Read, Shapes, need


def gpt_oss(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> Iterator[QuantizedWeight]:
    """`X_blocks` [E, outputs, inputs / 32, 16] and `X_scales`; the parameter X is [E, inputs, outputs]."""
    for key, (_, shape) in shapes.items():
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        scales = f"{name}_scales"
        need(shapes, scales, name, folder)
        if len(shape) != 4 or shape[-1] != 16:
            raise CheckpointError(f"{folder}: {key} has shape {list(shape)}; [experts, rows, groups, 16] is expected")

        readers: dict[str, PieceReader] = {
            "codes": lambda rows, key=key: read(key, rows).flatten(-2),  # type: ignore[misc]
            "scales": lambda rows, scales=scales: read(scales, rows),  # type: ignore[misc]
        }
        yield QuantizedWeight(
            name=name,
            shape=(shape[0], shape[1], 32 * shape[2]),
            form=MXFP4(),
            keys=(key, scales),
            readers=readers,
            transposed=True,
            rounding=torch.bfloat16,
        )


def deepseek(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> Iterator[QuantizedWeight]:
    """`X.weight` e4m3 and `X.weight_scale_inv`, a scale that multiplies, for blocks of the size in config.json."""
    size = config.get("weight_block_size")
    if not (isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] and isinstance(size[0], int)):
        raise CheckpointError(
            f"{folder}: weight_block_size is {size!r}; fp8 folders are read with square blocks, such as [128, 128], "
            "and the size cannot be seen in the shapes"
        )
    for key, (dtype, shape) in shapes.items():
        if dtype != "F8_E4M3" or not key.endswith(".weight"):
            continue
        scales = f"{key}_scale_inv"
        need(shapes, scales, key, folder)

        def block_scales(rows: slice, scales: str = scales) -> Tensor:
            stored = read(scales, rows)
            if stored.dtype == torch.uint8:  # powers of two (scale_fmt: ue8m0)
                stored = stored.view(torch.float8_e8m0fnu)
            return as_bytes(stored.float())

        readers: dict[str, PieceReader] = {
            "codes": lambda rows, key=key: as_bytes(read(key, rows)),  # type: ignore[misc]
            "scales": block_scales,
        }
        yield QuantizedWeight(name=key, shape=shape, form=FP8Block(block=size[0]), keys=(key, scales), readers=readers)


def bitsandbytes(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> Iterator[QuantizedWeight]:
    """`X.weight`: codes of the flattened matrix; `X.weight.absmax` and others; a description as JSON bytes."""
    if config.get("load_in_8bit"):
        raise CheckpointError(
            f"{folder}: 8-bit weights of bitsandbytes (LLM.int8) are not read; take a 4-bit or a dense folder"
        )
    suffix = ".quant_state.bitsandbytes__"
    for key in shapes:
        if suffix not in key:
            continue
        name, _, kind = key.partition(suffix)
        if kind != "nf4":
            raise CheckpointError(
                f"{folder}: {name} is stored as bitsandbytes {kind}; of its 4-bit formats nf4 is read"
            )
        state = parse_json(bytes(read(key).tolist()), Path(folder) / key)
        shape, block = tuple(state.get("shape", ())), state.get("blocksize")
        nested = f"{name}.nested_absmax" in shapes
        form = NF4(block=int(block or 0) or 64, nested=nested)
        if len(shape) != 2 or (nested and state.get("nested_blocksize") != NF4.nested_block):
            raise CheckpointError(f"{folder}: {key} describes shape {shape} and nested blocks that are not read here")
        if reason := form.refusal(*shape):
            raise CheckpointError(f"{folder}: {name}: {reason}, so its blocks cross rows; take the dense model")
        keys = (name, key, *(k for k in shapes if k.startswith(f"{name}.") and k != key))
        tables = [(f"{name}.quant_map", TABLE)] + ([(f"{name}.nested_quant_map", nested_map())] if nested else [])
        for table, values in tables:
            need(shapes, table, name, folder)
            if not torch.equal(read(table).float(), torch.tensor(values)):
                raise CheckpointError(f"{folder}: {table} is another table than bitsandbytes ships")

        dtype = str(state.get("dtype", "float32"))
        rounding = getattr(torch, dtype) if dtype in ("float32", "bfloat16", "float16") else torch.float32
        readers = _nf4_pieces(name, shape, form, state, shapes, read)
        yield QuantizedWeight(name=name, shape=shape, form=form, keys=keys, readers=readers, rounding=rounding)


def _nf4_pieces(
    name: str, shape: tuple[int, ...], form: NF4, state: Mapping[str, Any], shapes: Shapes, read: Read
) -> dict[str, PieceReader]:
    """Return the readers of a matrix whose codes and scales are stored as vectors of the flattened matrix."""
    blocks = shape[1] // form.block
    # Codes are bytes in tensors of any dtype; a row may begin within an element of it.
    size = 2 if shapes[name][0] in ("BF16", "F16") else 4 if shapes[name][0] == "F32" else 1

    def codes(rows: slice) -> Tensor:
        each, rest = divmod(shape[1] // 2, size)
        if rest:
            return as_bytes(read(name)).flatten().reshape(-1, shape[1] // 2)[rows]
        stored = read(name, slice(rows.start * each, rows.stop * each))
        return as_bytes(stored.flatten()).reshape(-1, shape[1] // 2)

    def scales(rows: slice) -> Tensor:
        absmax = read(f"{name}.absmax", slice(rows.start * blocks, rows.stop * blocks)).reshape(-1, blocks)
        return absmax if form.nested else as_bytes(absmax)

    readers: dict[str, PieceReader] = {"codes": codes, "scales": scales}
    if form.nested:
        offset = torch.tensor([[float(state["nested_offset"])]], dtype=torch.float32)
        readers["nested"] = lambda rows: as_bytes(read(f"{name}.nested_absmax", rows).float()[:, None])
        readers["offset"] = lambda rows: as_bytes(offset)[rows]
    return readers
