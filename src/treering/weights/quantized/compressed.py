"""Folders of compressed-tensors: nvfp4, mxfp4, packed integers, fp8 and int8."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import FP8, MXFP4, Format, FP8Block, Integer
from treering.formats.bits import as_bytes, pack_stream, row_bytes, unpack_stream
from treering.weights.quantized.weight import DTYPES, PieceReader, QuantizedWeight, Read, Shapes, need, nvfp4_pieces


def compressed(config: Mapping[str, Any], shapes: Shapes, read: Read, folder: str) -> Iterator[QuantizedWeight]:
    if transforms := config.get("transform_config"):
        raise CheckpointError(
            f"{folder}: transform_config is set ({str(transforms)[:60]}…): its weights are rotated, and activations "
            "would have to be, too. Take a folder without transforms"
        )
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise CheckpointError(f"{folder}: its weights are stored sparse ({sparsity['format']}), which is not read here")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{folder}: quantization_config has no config_groups")
    for key, (dtype, _) in shapes.items():
        name, _, leaf = key.rpartition(".")
        if leaf != "weight_packed" and not (leaf == "weight" and dtype in ("F8_E4M3", "I8")):
            continue
        need(shapes, f"{name}.weight_scale", f"{name}.weight", folder)
        if f"{name}.weight_g_idx" in shapes:
            raise CheckpointError(f"{folder}: {name} orders its groups by activations (weight_g_idx); refused")
        module = _CompressedLinear(name, _arguments(groups, name, folder), shapes, read, folder)
        yield module.packed() if leaf == "weight_packed" else module.eight_bits()


def _arguments(groups: Mapping[str, Any], module: str, folder: str) -> Mapping[str, Any]:
    """Return `weights` of the group that names the module: exactly or by `re:`, else by the class of all linears."""
    chosen = []
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, Mapping) else None
        for target in targets if isinstance(targets, list) else []:
            exact = target == module or (str(target).startswith("re:") and _matches(str(target)[3:], module))
            if exact or target == "Linear":
                chosen.append((not exact, group.get("weights") or {}))
    if not chosen:
        raise CheckpointError(f"{folder}: {module} is quantized, and no group of quantization_config names it")
    return min(chosen, key=lambda pair: pair[0])[1]


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False


@dataclass(frozen=True)
class _CompressedLinear:
    """The tensors of one linear. `arguments` are the settings of its group."""

    name: str
    arguments: Mapping[str, Any]
    shapes: Shapes
    read: Read
    folder: str

    def key(self, leaf: str) -> str:
        return f"{self.name}.{leaf}"

    @property
    def scale_dtype(self) -> str:
        return DTYPES.get(self.shapes[self.key("weight_scale")][0], "")

    @property
    def group(self) -> int:
        """As `Integer.group` counts it."""
        return {"channel": 0, "tensor": -1}.get(
            str(self.arguments.get("strategy")), self.arguments.get("group_size") or 0
        )

    def eight_bits(self) -> QuantizedWeight:
        """`weight` holds the codes themselves: e4m3, or int8 in two's complement."""
        weight, scale = self.key("weight"), self.key("weight_scale")
        shape = self.shapes[weight][1]
        form = self._eight_bit_form()

        bias = 0x80 if isinstance(form, Integer) else 0  # codes of Integer are biased by 128
        readers: dict[str, PieceReader] = {
            "codes": lambda rows: as_bytes(self.read(weight, rows)) ^ bias,
            "scales": lambda rows: self._scales(form.groups(*shape)[0], rows),
        }
        return QuantizedWeight(name=weight, shape=shape, form=form, keys=(weight, scale), readers=readers)

    def _scales(self, number: int, rows: slice) -> Tensor:
        """Return rows of the scales, of which there are `number`: stored as vector or matrix, or one without rows."""
        key = self.key("weight_scale")
        if self.shapes[key][1][:1] == (number,):
            return as_bytes(self.read(key, rows).reshape(rows.stop - rows.start, -1))
        return as_bytes(self.read(key).reshape(number, -1))[rows]

    def _eight_bit_form(self) -> Format:
        kind, strategy = self.arguments.get("type", "int"), self.arguments.get("strategy")
        if self.scale_dtype and kind == "float" and strategy in ("tensor", "channel"):
            return FP8(scale=strategy, scale_dtype=self.scale_dtype)
        if self.scale_dtype and kind == "float" and strategy == "block":
            block = self.arguments.get("block_structure")
            if isinstance(block, list) and len(set(block)) == 1 and isinstance(block[0], int):
                return FP8Block(block=block[0], scale_dtype=self.scale_dtype)
        if self.scale_dtype and kind == "int" and self.arguments.get("symmetric", True):
            return Integer(width=8, group=self.group, scale_dtype=self.scale_dtype)
        raise self._unknown()

    def packed(self) -> QuantizedWeight:
        """`weight_packed` holds several codes in each number."""
        packed, scale = self.key("weight_packed"), self.key("weight_scale")
        rows, words = self.shapes[packed][1]
        kind, width = self.arguments.get("type", "int"), self.arguments.get("num_bits")
        if kind == "int" and isinstance(width, int) and 2 <= width <= 8 and self.scale_dtype:
            return self._integers(rows, words, width)
        if kind != "float" or width != 4:
            raise self._unknown()
        form: Format = MXFP4()
        keys: tuple[str, ...] = (packed, scale)
        readers: dict[str, PieceReader] = {
            "codes": lambda rows: self.read(packed, rows),
            "scales": lambda rows: as_bytes(self.read(scale, rows)),
        }
        if self.shapes[scale][0] == "F8_E4M3":
            names = ("weight_packed", "weight_global_scale")
            form, keys, readers = nvfp4_pieces(self.name, *names, "divide", self.shapes, self.read, self.folder)
        return QuantizedWeight(
            name=self.key("weight"),
            shape=(rows, 2 * words),
            form=form,
            keys=keys,
            readers=readers,
            rounding=torch.bfloat16,  # the library decodes 4-bit floats to it, whatever the model's dtype
        )

    def _integers(self, rows: int, words: int, width: int) -> QuantizedWeight:
        """Codes in 32-bit words: as one bit stream a row, or, before version 0.18, 32 // width to a word."""
        packed, scale, shape, zeros = map(
            self.key, ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        )
        asymmetric = not self.arguments.get("symmetric", True)
        for key in (shape, zeros) if asymmetric else (shape,):
            need(self.shapes, key, self.key("weight"), self.folder)
        columns = int(self.read(shape)[-1])
        stream, older = row_bytes(columns, width) // 4, -(-columns // (32 // width))
        if words == stream == older and 32 % width and columns > 32 // width:
            raise CheckpointError(
                f"{self.folder}: {self.name} packs {width}-bit values in one of two layouts that have the same size "
                "here (compressed-tensors before and since 0.18); which one cannot be seen. Take a 4- or 8-bit folder"
            )
        if words not in (stream, older):
            raise CheckpointError(
                f"{self.folder}: {packed} has {words} words a row; {columns} values of {width} bits need {stream}"
            )
        form = Integer(width=width, group=self.group, scale_dtype=self.scale_dtype, asymmetric=asymmetric)  # type: ignore[arg-type]

        number = form.groups(rows, columns)[0]

        def codes(cut: slice) -> Tensor:
            stored = self.read(packed, cut)
            return as_bytes(stored) if words == stream else pack_stream(_by_words(stored, width, columns), width)

        def zero_points(cut: slice) -> Tensor:
            # Packed along the rows, unlike the codes.
            unpack = _by_stream if words == stream else _by_words
            biased = unpack(self.read(zeros).mT.contiguous(), width, number).mT[cut]
            return as_bytes((biased.to(torch.int16) - (1 << width - 1)).to(torch.int8))

        readers: dict[str, PieceReader] = {"codes": codes, "scales": lambda cut: self._scales(number, cut)}
        readers |= {"zeros": zero_points} if asymmetric else {}
        keys = (packed, scale, shape, zeros) if asymmetric else (packed, scale, shape)
        return QuantizedWeight(name=self.key("weight"), shape=(rows, columns), form=form, keys=keys, readers=readers)

    def _unknown(self) -> CheckpointError:
        asked = ("type", "num_bits", "strategy", "symmetric")
        described = ", ".join(f"{name} {self.arguments[name]}" for name in asked if name in self.arguments)
        return CheckpointError(
            f"{self.folder}: {self.name} is quantized in a way that is not read here ({described}). What is: float of "
            "4 bits (nvfp4, mxfp4), float of 8 bits by tensor, channel or block, integers of 2 to 8 bits"
        )


def _by_words(words: Tensor, width: int, columns: int) -> Tensor:
    """Return unsigned codes of which each 32-bit word holds 32 // width, the first in its lowest bits."""
    shifts = torch.arange(32 // width, dtype=torch.int32, device=words.device) * width
    codes = (words[..., None] >> shifts) & ((1 << width) - 1)
    return codes.flatten(-2)[..., :columns].to(torch.uint8)


def _by_stream(words: Tensor, width: int, columns: int) -> Tensor:
    return unpack_stream(as_bytes(words), width, columns)
