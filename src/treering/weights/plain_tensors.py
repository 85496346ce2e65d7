"""The plain tensors of a Hugging Face folder or of a live model, read on request, one at a time.

Tensors that a folder stores in another shape than the module go through `conversion`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.core.errors import CheckpointError, PlanError
from treering.store.model_folder import tensor_headers
from treering.store.untrusted import Header
from treering.technique import StoredTensor
from treering.weights.conversion import ConvertedTensors, places, stored_dtype
from treering.weights.quantized.folder import QuantizedFolder
from treering.weights.quantized.merge import merged, stored_tensor
from treering.weights.quantized.opened import as_decoded, open_tensors
from treering.weights.undeclared_codes import refuse_codes, refuse_packed, refuse_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARED_ROWS = 4096  # at a time


@dataclass(frozen=True, kw_only=True)
class PlainTensor:
    """A plain weight that is read on request, by rows where the file stores each of them separately."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reader: Callable[[], Tensor]
    row_reader: Callable[[int, int], Tensor] | None = None
    stored: StoredTensor | None = None
    start: int = 0

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
                refuse_codes(folder, headers, [key], target, wanted[target])
                tensors[target] = _stored(target, key, files[key], wanted[target])
                if key in kept:
                    tensors[target] = replace(tensors[target], stored=stored_tensor(kept[key]))
                groups.append((target,))
            elif target in state:
                tied.append((key, target))
            else:
                unused.append(key)
            continue
        reader = ConvertedTensors(model, target, items, by_pattern[items[0][1]], files)
        names = reader.targets(wanted)
        if not names:
            unused.extend(key for key, _ in items)
            continue
        refuse_codes(folder, headers, [key for key, _ in items], names[0], wanted[names[0]])
        by_rows = len(names) == 1 and reader.keeps_rows(names[0], tuple(wanted[names[0]].shape))
        for name in names:
            merge = merged(reader.convert, [key for key, _ in items], name, tuple(wanted[name].shape), kept)
            tensors[name] = PlainTensor(
                name=name,
                shape=tuple(wanted[name].shape),
                dtype=stored_dtype(files[items[0][0]], items[0][0]),
                reader=lambda name=name, reader=reader: reader.read(name),  # type: ignore[misc]
                row_reader=(lambda a, b, name=name, reader=reader: reader.rows(name, a, b)) if by_rows else None,  # type: ignore[misc]
                stored=None if merge is None else stored_tensor(merge),
            )
        groups.append(names)
    refuse_scales(folder, headers.keys() - set(unused), unused)
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        refuse_packed(folder, headers, missing[0], unused)
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


def _refuse_other_copy(folder: Path, stored: tuple[Path, Header], key: str, owner: PlainTensor) -> None:
    """Refuse a second copy of a tied tensor that differs from the first; equal copies are harmless."""
    with open_tensors(stored[0]) as opened:
        same = stored[1].shape == owner.shape and all(
            torch.equal(opened.get_slice(key)[row : row + COMPARED_ROWS], owner.rows(row, row + COMPARED_ROWS))
            for row in range(0, owner.shape[0], COMPARED_ROWS)
        )
    if not same:
        raise CheckpointError(
            f"{folder}: {key} is another tensor than {owner.name}, and config.json declares them one "
            "(tie_word_embeddings), so that it would be dropped. Set tie_word_embeddings to false in config.json, or "
            f"remove {key} from the folder"
        )


def _stored(name: str, key: str, file: Path, like: Tensor) -> PlainTensor:
    with open_tensors(file) as opened:
        shape = tuple(opened.get_slice(key).get_shape())
    if shape != tuple(like.shape):
        raise CheckpointError(f"{file}: {key} has shape {shape}; the model's {name} has {tuple(like.shape)}")

    def read() -> Tensor:
        with open_tensors(file) as opened:
            return opened.get_tensor(key)

    def rows(start: int, stop: int) -> Tensor:
        with open_tensors(file) as opened:
            return opened.get_slice(key)[start:stop] if shape else opened.get_tensor(key)

    return PlainTensor(name=name, shape=shape, dtype=stored_dtype(file, key), reader=read, row_reader=rows)
