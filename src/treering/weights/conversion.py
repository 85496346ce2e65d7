"""Tensors of a Hugging Face folder in the names and shapes of the module, and back.

The only file that uses the internals of transformers' weight conversion: many models keep experts or fused projections
in another shape in the file than in the module, and the mapping of transformers translates, tensor by tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.weights.quantized.opened import open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class ConvertedTensors:
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
        with open_tensors(self.files[key]) as opened:
            return torch.empty(opened.get_slice(key).get_shape(), device="meta")

    def _read(self, key: str) -> Tensor:
        with open_tensors(self.files[key]) as opened:
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
            with open_tensors(self.files[key]) as opened:
                return opened.get_slice(key)[start:stop]

        return self.convert(some)[name]

    def _empty(self, name: str) -> Tensor:
        shape = self.convert(self._shape_only)[name].shape
        key = self.items[0][0]
        return torch.empty((0, *shape[1:]), dtype=stored_dtype(self.files[key], key))

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


def stored_dtype(file: Path, key: str) -> torch.dtype:
    """Return the dtype of a tensor in a file, from a slice without rows; a scalar has no rows to leave out."""
    with open_tensors(file) as opened:
        piece = opened.get_slice(key)
        return piece[:0].dtype if piece.get_shape() else opened.get_tensor(key).dtype


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
