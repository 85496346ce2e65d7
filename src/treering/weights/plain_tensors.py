"""Plain tensors in and out of Hugging Face folders, streamed, one at a time.

The only file that uses the internals of transformers' weight conversion: many models keep experts or fused projections
in another shape in the file than in the module, and the mapping of transformers translates, tensor by tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from treering.core.errors import CheckpointError, PlanError
from treering.store.model_folder import tensor_headers
from treering.store.untrusted import Header
from treering.technique import StoredTensor
from treering.weights.quantized.folder import QuantizedFolder
from treering.weights.quantized.merge import merged, stored_tensor
from treering.weights.quantized.opened import DecodedWeight, as_decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class PlainTensor:
    """A plain weight that is read on request, by rows where the file stores each of them separately."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reader: Callable[[], Tensor]
    row_reader: Callable[[int, int], Tensor] | None = None
    stored: StoredTensor | None = None

    def read(self) -> Tensor:
        return self.reader()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.row_reader(start, stop) if self.row_reader is not None else self.reader()[start:stop]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The plain tensors of a model, by their name in the module. Those of a group are cheapest to read together."""

    tensors: Mapping[str, PlainTensor]
    groups: tuple[tuple[str, ...], ...]
    where: str
    unused: tuple[str, ...] = field(default=())  # tensors of the folder that the model does not have
    shapes: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # of the folder's tensors, decoded where quantized
    live_values: dict[str, Tensor] | None = None  # of a live model, until they have been copied

    @property
    def spent(self) -> bool:
        """Whether the values of a live model have been freed already."""
        return self.live_values is not None and not self.live_values

    def release(self) -> None:
        """Free a live model's old values: they would stay in memory next to the new ones for the complete run."""
        if self.live_values is not None:
            self.live_values.clear()


def from_model(model: nn.Module) -> Source:
    """Return the tensors of a live model. This source alone keeps them alive once the model has moved to meta."""
    values = {name: value.detach() for name, value in plain_tensors(model).items()}
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise PlanError(
                f"the live model holds {name} in {str(parameter.dtype).removeprefix('torch.')}: a quantized weight, "
                "and this version trains dense ones. Load the model without quantization, or call its dequantize()"
            )
    tensors = {
        name: PlainTensor(
            name=name,
            shape=tuple(value.shape),
            dtype=value.dtype,
            reader=lambda name=name: values[name],  # type: ignore[misc]
            row_reader=lambda a, b, name=name: values[name][a:b],  # type: ignore[misc]
        )
        for name, value in values.items()
    }
    return Source(
        tensors=tensors, groups=tuple((n,) for n in tensors), where="the model that was given", live_values=values
    )


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, tied ones once, and persistent buffers, by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return tensors


def keep_wide(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Cast to float32 what the family keeps in float32. transformers does it only while it loads a folder."""
    from transformers.core_model_loading import build_glob_alternation

    wide = model._get_dtype_plan(dtype)
    if not wide:
        return
    pattern, by_group, _ = build_glob_alternation(list(wide))
    for name, tensor in plain_tensors(model).items():
        match = pattern.search(name)
        if match and tensor.is_floating_point():
            tensor.data = tensor.data.to(wide[by_group[match.lastgroup or ""]])


def from_folder(
    model: "PreTrainedModel", folder: Path, quantized: QuantizedFolder | None = None, *, keep: bool = True
) -> Source:
    """Return the tensors of a Hugging Face folder, for a model (on meta) made from the folder's config.

    Codes that config.json does not declare are refused: they are not weights.

    Args:
        quantized: the folder's quantized weights, if it has any. Reading one decodes it to the model's dtype.
        keep: whether they are also given as the folder stores them, as `LazyTensor.stored`.
    """
    headers: dict[str, tuple[Any, Header]] = dict(tensor_headers(folder))
    if quantized is not None:
        headers = as_decoded(headers, quantized, model.dtype)
    kept = quantized.weights if quantized is not None and keep else {}
    files = {key: path for key, (path, _) in headers.items()}
    wanted = plain_tensors(model)
    state = model.state_dict(keep_vars=True)
    gathered, by_pattern = places(model, files, state)
    tensors: dict[str, PlainTensor] = {}
    groups: list[tuple[str, ...]] = []
    unused: list[str] = []
    tied: list[tuple[str, str]] = []
    for target, items in gathered.items():
        if items[0][1] is None:
            key = items[-1][0]
            if target in wanted:
                _refuse_codes(folder, headers, [key], target, wanted[target])
                tensors[target] = _stored(target, key, files[key], wanted[target])
                if key in kept:
                    tensors[target] = replace(tensors[target], stored=stored_tensor(kept[key]))
                groups.append((target,))
            elif target in state:
                tied.append((key, target))
            else:
                unused.append(key)
            continue
        reader = _Converted(model, target, items, by_pattern[items[0][1]], files)
        names = reader.targets(wanted)
        if not names:
            unused.extend(key for key, _ in items)
            continue
        _refuse_codes(folder, headers, [key for key, _ in items], names[0], wanted[names[0]])
        by_rows = len(names) == 1 and reader.keeps_rows(names[0], tuple(wanted[names[0]].shape))
        for name in names:
            merge = merged(reader.convert, [key for key, _ in items], name, tuple(wanted[name].shape), kept)
            tensors[name] = PlainTensor(
                name=name,
                shape=tuple(wanted[name].shape),
                dtype=_dtype(files[items[0][0]], items[0][0]),
                reader=lambda name=name, reader=reader: reader.read(name),  # type: ignore[misc]
                row_reader=(lambda a, b, name=name, reader=reader: reader.rows(name, a, b)) if by_rows else None,  # type: ignore[misc]
                stored=None if merge is None else stored_tensor(merge),
            )
        groups.append(names)
    _refuse_scales(folder, headers.keys() - set(unused), unused)
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        _refuse_packed(folder, headers, missing[0], unused)
        if others := [key for key in unused if quantized is not None and key in quantized.weights]:
            raise CheckpointError(
                f"{folder} has no tensor for {missing[0]}; it has quantized weights that no tensor of "
                f"{type(model).__name__} is made of, such as {others[0]}: it is of another model, or in a layout that "
                "is not read here. Take the unquantized model"
            )
        raise CheckpointError(
            f"{folder} has no tensor for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f" of {type(model).__name__}; the folder is incomplete or belongs to another architecture"
        )
    for key, target in tied:
        owner = next(name for name, value in wanted.items() if value is state[target])
        _refuse_other_copy(folder, headers[key], key, tensors[owner])
    return Source(
        tensors=tensors,
        groups=tuple(groups),
        where=str(folder),
        unused=tuple(unused),
        shapes={key: header.shape for key, (_, header) in headers.items()},
    )


ROWS = 4096  # that are compared at a time
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


def _refuse_codes(
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


def _refuse_other_copy(folder: Path, stored: tuple[Path, Header], key: str, owner: PlainTensor) -> None:
    """Refuse a second copy of a tied tensor that differs from the first; equal copies are harmless."""
    with _opened(stored[0], "pt") as opened:
        same = stored[1].shape == owner.shape and all(
            torch.equal(opened.get_slice(key)[row : row + ROWS], owner.rows(row, row + ROWS))
            for row in range(0, owner.shape[0], ROWS)
        )
    if not same:
        raise CheckpointError(
            f"{folder}: {key} is another tensor than {owner.name}, and config.json declares them one "
            "(tie_word_embeddings), so that it would be dropped. Set tie_word_embeddings to false in config.json, or "
            f"remove {key} from the folder"
        )


def _refuse_scales(folder: Path, used: AbstractSet[str], unused: Sequence[str]) -> None:
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


def _refuse_packed(
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


def places(
    model: "PreTrainedModel", keys: Iterable[str], state: dict[str, Any]
) -> tuple[dict[str, list[tuple[str, str | None]]], dict[str, Any]]:
    """Return for each tensor of the module, whose names are those of `state`, the `keys` of a folder that become it.

    With each key that goes through a converter comes the converter's pattern; the second value has converters by
    pattern.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    gathered: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:  # a renaming that was meant for older files
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        gathered.setdefault(target, []).append((key, pattern))
    return gathered, {pattern: c for c in converters for pattern in c.source_patterns}


def _stored(name: str, key: str, file: Path, like: Tensor) -> PlainTensor:
    with _opened(file, "pt") as opened:
        shape = tuple(opened.get_slice(key).get_shape())
    if shape != tuple(like.shape):
        raise CheckpointError(f"{file}: {key} has shape {shape}; the model's {name} has {tuple(like.shape)}")

    def read() -> Tensor:
        with _opened(file, "pt") as opened:
            return opened.get_tensor(key)

    def rows(start: int, stop: int) -> Tensor:
        with _opened(file, "pt") as opened:
            return opened.get_slice(key)[start:stop] if shape else opened.get_tensor(key)

    return PlainTensor(name=name, shape=shape, dtype=_dtype(file, key), reader=read, row_reader=rows)


def _opened(file: Path | DecodedWeight, framework: str) -> Any:
    """Return an opened safetensors file, or a quantized weight in its place."""
    return file if isinstance(file, DecodedWeight) else safe_open(file, framework)


def _dtype(file: Path, key: str) -> torch.dtype:
    """Return the dtype of a tensor in a file, from a slice without rows; a scalar has no rows to leave out."""
    with _opened(file, "pt") as opened:
        piece = opened.get_slice(key)
        return piece[:0].dtype if piece.get_shape() else opened.get_tensor(key).dtype


class _Converted:
    """Tensors of the file that become tensors of the module through one of transformers' converters.

    The last result is kept until each of its tensors has been read once: a fused projection is read once, not thrice.
    """

    def __init__(self, model: "PreTrainedModel", target: str, items: list, converter: Any, files: dict[str, Path]):
        self.model, self.target, self.items, self.converter, self.files = model, target, items, converter, files
        self.ready: dict[str, Tensor] = {}

    def convert(self, get: Callable[[str], Tensor], items: Sequence[tuple[str, str]] = ()) -> dict[str, Tensor]:
        converter = deepcopy(self.converter)
        for key, pattern in items or self.items:
            converter.add_tensor(self.target, key, pattern, get(key))
        converted = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _shape_only(self, key: str) -> Tensor:
        with _opened(self.files[key], "pt") as opened:
            return torch.empty(opened.get_slice(key).get_shape(), device="meta")

    def _read(self, key: str) -> Tensor:
        with _opened(self.files[key], "pt") as opened:
            return opened.get_tensor(key)

    def keeps_rows(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether rows can be converted without the others: those of one expert, if the file's tensors are
        experts that are stacked, else those of every tensor of the file, if nothing moves along dimension 0."""
        stacks, others = self._stacks()
        if not shape or not all(_within_rows(operation, len(shape)) for operation in others):
            return False
        first = self._experts(0, 1) if stacks else self.items
        rows = self.convert(lambda key: self._shape_only(key)[: None if stacks else 1], first)
        return {n: tuple(v.shape) for n, v in rows.items()} == {name: (1, *shape[1:])}

    def _stacks(self) -> tuple[bool, list[Any]]:
        """Return whether the first operation stacks tensors along dimension 0, and the other operations."""
        from transformers.core_model_loading import MergeModulelist

        first, *rest = self.converter.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        return stacks, rest if stacks else [first, *rest]

    def _experts(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Return the file's tensors of experts `start` to `stop`: of each pattern, those at these positions."""
        by_pattern: dict[str, list[str]] = {}
        for key, pattern in self.items:
            by_pattern.setdefault(pattern, []).append(key)
        return [(key, pattern) for pattern, keys in by_pattern.items() for key in keys[start:stop]]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of the converted tensor; only the tensors that they are computed from are read."""
        if stop <= start:
            return self._empty(name)
        if self._stacks()[0]:
            return self.convert(self._read, self._experts(start, stop))[name]

        def some(key: str) -> Tensor:
            with _opened(self.files[key], "pt") as opened:
                return opened.get_slice(key)[start:stop]

        return self.convert(some)[name]

    def _empty(self, name: str) -> Tensor:
        shape = self.convert(self._shape_only)[name].shape
        key = self.items[0][0]
        return torch.empty((0, *shape[1:]), dtype=_dtype(self.files[key], key))

    def targets(self, wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return names of tensors that the model has, by converting on the meta device: no weight is read."""
        file = self.files[self.items[0][0]]
        try:
            converted = self.convert(self._shape_only)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: {self.items[0][0]} and {len(self.items) - 1} more cannot be joined to {self.target}: {error}"
            ) from None
        for name, value in converted.items():
            if name in wanted and value.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{file}: {self.items[0][0]} and {len(self.items) - 1} more give shape {tuple(value.shape)}; "
                    f"the model's {name} has {tuple(wanted[name].shape)}"
                )
        return tuple(name for name in converted if name in wanted)

    def read(self, name: str) -> Tensor:
        if name not in self.ready:
            self.ready = self.convert(self._read)
        return self.ready.pop(name)


def _within_rows(operation: Any, ndim: int) -> bool:
    """Return whether an operation of a conversion computes row i of its result from row i of what it is given."""
    from transformers.core_model_loading import Concatenate, Interleave, Transpose

    if isinstance(operation, Concatenate):
        return operation.dim % ndim != 0 and operation.num_shards_attribute is None
    if isinstance(operation, Interleave):
        return operation.dim % ndim != 0
    if isinstance(operation, Transpose):  # one that looks at the model's shape first would see another one
        return 0 not in (operation.dim0 % ndim, operation.dim1 % ndim) and not operation.check_dims
    return False


def export_groups(model: "PreTrainedModel", names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return `names` in groups that have to be converted to the file's layout together."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    converters = [c for c in _reverse(model) if isinstance(c, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(rename_source_key(name, [], converters)[0], []).append(name)
    return [tuple(group) for group in groups.values()]


def to_file_layout(model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one group of module tensors in the names and shapes of the file."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def _reverse(model: "PreTrainedModel") -> list:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    mapping = [m for m in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(m, PrefixChange)]
    return [m.reverse_transform() for m in mapping[::-1]]
