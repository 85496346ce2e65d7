"""Quantized weights of a model as the tensors of a folder: which rows of which stack become which tensor, and how.

The reverse of `merge`: transformers' converters cut stacks of experts and merged projections into the tensors of the
file. Which rows become which tensor is found by running the converter on the numbers of the rows; codes and scales are
then cut alike. What cannot be cut exactly is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.formats import NF4, NVFP4, Format, FP8Block
from treering.formats.layout import Tensors
from treering.technique import Packing
from treering.weights.quantized.layouts import BitsAndBytes, CompressedTensors, DeepSeek, FolderLayout, GptOss

ToFile = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # one group of the module's tensors, in the file's form
REMEDY = "export the dense model, which has the same values, or quantize in another format (nvfp4, int4)"


@dataclass(frozen=True, kw_only=True)
class PublishedMatrix:
    """One tensor of the folder: rows `start` to `stop` of a weight, or of one expert of a stack.

    Attributes:
        key: the name that it would have unquantized, in the folder.
        weight: the plain name.
        expert: None: of a matrix, or of all experts.
        shape: [..., outputs, inputs].
    """

    key: str
    weight: str
    expert: int | None
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """How the packed weights of a model are written: by plain name, as tensors of `layout`."""

    layout: FolderLayout
    packings: Mapping[str, Packing]
    matrices: Mapping[str, tuple[PublishedMatrix, ...]]
    shapes: Mapping[str, tuple[int, ...]]  # of W [..., outputs, inputs]

    def announced(self, weight: str) -> dict[str, Tensor]:
        """Return the folder's tensors of a weight on the meta device."""
        *stack, rows, columns = self.shapes[weight]
        pieces = self.packings[weight].form.pieces(rows, columns)
        empty = {k: torch.empty(*stack, *p.shape, dtype=torch.uint8, device="meta") for k, p in pieces.items()}
        return {name: t.to("meta") for name, t in self.tensors(weight, empty).items()}

    def tensors(self, weight: str, packed: Tensors) -> dict[str, Tensor]:
        """Return the folder's tensors of a weight from those of its format."""
        tensors: dict[str, Tensor] = {}
        for matrix in self.matrices[weight]:
            form, cut = _cut(self.packings[weight].form, packed, matrix, self.shapes[weight])
            tensors |= self.layout.tensors(matrix.key, form, cut, matrix.shape)
        return tensors

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """Return `quantization_config`; `plain`: the modules of linear layers that are not quantized."""
        forms = {
            matrix.key: _cut(self.packings[weight].form, {}, matrix, self.shapes[weight])[0]
            for weight, matrices in self.matrices.items()
            for matrix in matrices
        }
        return self.layout.config(forms, plain)

    def forms(self) -> dict[str, Format]:
        """Return the format of each quantized weight of the folder, by key."""
        return {
            matrix.key: _cut(self.packings[weight].form, {}, matrix, self.shapes[weight])[0]
            for weight, matrices in self.matrices.items()
            for matrix in matrices
        }


def publication(
    packings: Mapping[str, Packing],
    plain: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    groups: Sequence[Sequence[str]],
    to_file: ToFile,
    model_type: str,
) -> Publication:
    """Return how weights are published, or raise PlanError, naming the weight that cannot be.

    Args:
        packings: by plain name.
        plain: shape and dtype of every plain tensor.
        groups: plain names that become tensors of the file together.
        to_file: converts tensors of one group to the file's.
        model_type: of the config.
    """
    shapes, matrices = {}, {}
    for name, packing in packings.items():
        shape = plain[name][0]
        shapes[name] = (*shape[:-2], shape[-1], shape[-2]) if packing.transposed else shape
        matrices[name] = _matrices(name, packing, shapes[name], to_file)
    for group in groups:
        if (chosen := [name for name in group if name in packings]) and len(group) > 1:
            _refuse_joined(group, chosen[0], plain, to_file)
    layout = _layout(packings, plain, model_type)
    for name, each in matrices.items():
        for matrix in each:
            form, _ = _cut(packings[name].form, {}, matrix, shapes[name])
            if reason := layout.refusal(form, matrix.shape):
                raise _refused(name, f"{form.label} cannot be published: {reason}")
    return Publication(layout=layout, packings=packings, matrices=matrices, shapes=shapes)


def _layout(
    packings: Mapping[str, Packing], plain: Mapping[str, tuple[tuple[int, ...], torch.dtype]], model_type: str
) -> FolderLayout:
    forms = [packing.form for packing in packings.values()]
    if any(isinstance(form, NF4) for form in forms):
        return BitsAndBytes(str(plain[next(iter(packings))][1]).removeprefix("torch."))
    blocks = {form for form in forms if isinstance(form, FP8Block) and form.scale_dtype == "float32"}
    if len(blocks) == 1 and len({str(form) for form in forms}) == 1:
        return DeepSeek(blocks.pop().block)
    if model_type == "gpt_oss" and any(len(plain[name][0]) > 2 for name in packings):
        return GptOss()
    return CompressedTensors()


def _matrices(name: str, packing: Packing, shape: tuple[int, ...], to_file: ToFile) -> tuple[PublishedMatrix, ...]:
    *stack, rows, columns = shape
    count = torch.arange(rows * (stack[0] if stack else 1))
    # Two columns: which of the result's dimensions are columns can be seen.
    numbers = torch.stack((2 * count, 2 * count + 1), -1).view(*stack, rows, 2)
    stored = numbers.mT.contiguous() if packing.transposed else numbers
    try:
        converted = to_file({name: stored})
    except (RuntimeError, ValueError) as error:
        raise _refused(name, f"its form in the model's files cannot be followed ({error})") from None
    found = []
    for key, value in converted.items():
        if stack and torch.equal(value, stored):
            found.append(
                PublishedMatrix(key=key, weight=name, expert=None, start=0, stop=rows, shape=(*stack, rows, columns))
            )
            continue
        if value.ndim != 2 or value.shape[1] != 2 or not torch.equal(value[:, 1], value[:, 0] + 1):
            raise _refused(name, f"{key} of the model's files holds inputs before outputs")
        lines = value[:, 0] // 2
        first, number = int(lines[0]), len(lines)
        if not torch.equal(lines, torch.arange(first, first + number)) or first // rows != int(lines[-1]) // rows:
            raise _refused(name, f"rows of {key} in the model's files are in another order")
        expert, start = divmod(first, rows)
        found.append(
            PublishedMatrix(
                key=key,
                weight=name,
                expert=expert if stack else None,
                start=start,
                stop=start + number,
                shape=(number, columns),
            )
        )
    return tuple(found)


def _refuse_joined(
    group: Sequence[str], name: str, plain: Mapping[str, tuple[tuple[int, ...], torch.dtype]], to_file: ToFile
) -> None:
    """Refuse a weight that the file holds in one tensor with another one."""
    empty = {n: torch.empty(plain[n][0], dtype=plain[n][1], device="meta") for n in group}
    together = {key: t.shape for key, t in to_file(empty).items()}
    alone = {key: t.shape for n, one in empty.items() for key, t in to_file({n: one}).items()}
    if together != alone:
        others = ", ".join(n for n in group if n != name)
        raise _refused(name, f"the model's files hold it in one tensor with {others}")


def _cut(form: Format, packed: Tensors, matrix: PublishedMatrix, shape: tuple[int, ...]) -> tuple[Format, Tensors]:
    """Return the format and the tensors of some rows of a weight, as exact as those of the complete one."""
    rows, columns = shape[-2:]
    if len(matrix.shape) > 2:
        return form, packed
    tensors = {key: t if matrix.expert is None else t[matrix.expert] for key, t in packed.items()}
    if isinstance(form, NVFP4) and form.parts > 1:
        height = rows // form.parts
        part, last = matrix.start // height, (matrix.stop - 1) // height
        if part == last:
            form = replace(form, parts=1)
            tensors |= {"global": tensors["global"][part : part + 1]} if tensors else {}
    if (matrix.start, matrix.stop) == (0, rows):
        return form, tensors
    if isinstance(form, FP8Block):
        if matrix.start % form.block:
            raise _refused(matrix.weight, f"{matrix.key} would begin inside a block of {form.block} rows")
        blocks = slice(matrix.start // form.block, -(-matrix.stop // form.block))
        tensors |= {"scales": tensors["scales"][blocks]} if tensors else {}
    if isinstance(form, NF4) and form.nested:
        each = columns // form.block
        if matrix.start * each % form.nested_block:
            raise _refused(matrix.weight, f"{matrix.key} would begin inside a block of nf4's nested scales")
        first, last = (row * each for row in (matrix.start, matrix.stop))
        nested = slice(first // form.nested_block, -(-last // form.nested_block))
        tensors |= {"nested": tensors["nested"][nested]} if tensors else {}
    pieces = form.pieces(rows, columns)
    return form, {key: t[matrix.start : matrix.stop] if pieces[key].by_rows else t for key, t in tensors.items()}


def _refused(name: str, why: str) -> PlanError:
    return PlanError(f"{name}: {why}; {REMEDY}", settings=("quantize.format",))
