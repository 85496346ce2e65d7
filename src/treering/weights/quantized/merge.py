"""Quantized weights that become one parameter of the module: merged as codes and scales, without decoding.

transformers' converters stack the experts of a folder, and concatenate gate and up or q, k and v. Which row of which
stored weight becomes which row of the parameter is found by running the converter on the numbers of the rows. Rows of
codes and scales then move alike. What is not by rows is kept where that is exact:

    nvfp4               a global scale for each part
    fp8, int, tensor    the scale of the matrix for each of its rows
    fp8 blocks          scales of all blocks, where each part but the last ends at a block's edge
    nf4, nested         scales of blocks in float32 instead of 8 bits, as decoding computes them
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.formats import FP8, NF4, NVFP4, Format, FP8Block, Integer
from treering.formats.bits import as_bytes
from treering.technique import StoredTensor
from treering.weights.quantized.weight import EVERY, QuantizedWeight

Convert = Callable[[Callable[[str], Tensor]], Mapping[str, Tensor]]
REMEDY = "Set model.dequantize to true, which decodes these weights"


@dataclass(frozen=True)
class StoredPiece:
    """One tensor of a stored weight, a `LazyTensor`."""

    weight: "QuantizedWeight | MergedWeight"
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.weight.shape
        return (*stack, *self.weight.form.pieces(rows, columns)[self.key].shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def stored(self) -> None:
        return None

    @property
    def start(self) -> int:
        return 0

    def read(self) -> Tensor:
        return self.weight.piece(self.key)

    def rows(self, start: int, stop: int) -> Tensor:
        if stop <= start:  # of a rank that has none
            return torch.empty((0, *self.shape[1:]), dtype=torch.uint8)
        return self.weight.piece(self.key, slice(start, stop))


def stored_tensor(weight: "QuantizedWeight | MergedWeight") -> StoredTensor:
    """Return the weight as techniques see it."""
    keys = weight.form.pieces(*weight.shape[-2:])
    rounding = None if weight.rounding == torch.float32 else weight.rounding
    return StoredTensor(form=weight.form, tensors={key: StoredPiece(weight, key) for key in keys}, rounding=rounding)


@dataclass(frozen=True)
class MergedWeight:
    """A parameter whose rows are rows of several quantized weights.

    Attributes:
        name: of the parameter.
        sources: the weights, all of one format.
        matrices: for each matrix of the parameter the numbers of its rows, counted over all sources.
        stacked: whether the matrices are a stack of experts; else there is one.
    """

    name: str
    sources: tuple[QuantizedWeight, ...]
    matrices: tuple[tuple[range, ...], ...]
    stacked: bool

    @property
    def rounding(self) -> torch.dtype:
        return self.sources[0].rounding

    @property
    def shape(self) -> tuple[int, ...]:
        stack = (len(self.matrices),) if self.stacked else ()
        return (*stack, sum(map(len, self.matrices[0])), self.sources[0].shape[-1])

    @cached_property
    def starts(self) -> Tensor:
        """The number of each source's first row."""
        return torch.tensor([0, *(source.shape[0] for source in self.sources)]).cumsum(0)

    def _runs(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        """Return the runs of rows of one source, each with the number of the source."""
        sources, counts = self._source_of(rows).unique_consecutive(return_counts=True)
        return list(zip(sources.tolist(), rows.split(counts.tolist()), strict=True))

    def _source_of(self, rows: Tensor) -> Tensor:
        return torch.bucketize(rows, self.starts, right=True) - 1

    @cached_property
    def parts(self) -> tuple[int, ...] | None:
        """The numbers of rows of the runs, each of one source, that every matrix consists of; None: they differ."""
        each = {tuple(len(run) for _, run in self._runs(_numbers(ranges))) for ranges in self.matrices}
        return next(iter(each)) if len(each) == 1 else None

    @cached_property
    def complete(self) -> bool:
        """Whether the runs are complete sources with their rows in order."""
        return all(
            torch.equal(run, torch.arange(int(self.starts[s]), int(self.starts[s + 1])))
            for ranges in self.matrices
            for s, run in self._runs(_numbers(ranges))
        )

    @cached_property
    def form(self) -> Format:
        """The format of the merged weight; CheckpointError where no exact one is known."""
        forms = {source.form for source in self.sources}
        form = self.sources[0].form
        if len(forms) > 1 or len({source.rounding for source in self.sources}) > 1:
            kinds = " and ".join(sorted({str(form) for form in forms}))
            raise CheckpointError(f"{self.name} is merged of weights in {kinds}, which no one format holds. {REMEDY}")
        alone = self.complete and self.parts is not None and len(self.parts) == 1
        if alone or all(piece.by_rows for piece in form.pieces(*self.shape[-2:]).values()):
            return form
        if isinstance(form, FP8):
            return replace(form, scale="channel")
        if isinstance(form, Integer):
            return replace(form, group=0)
        if isinstance(form, NF4):
            return replace(form, nested=False)
        if isinstance(form, NVFP4) and self.parts is not None and len(set(self.parts)) == 1:
            return replace(form, parts=len(self.parts))
        if isinstance(form, FP8Block) and self.parts is not None and self.complete:
            if all(rows % form.block == 0 for rows in self.parts[:-1]):
                return form
        raise CheckpointError(
            f"{self.name} is merged of {len(self.sources)} weights in {form.name}, whose scales cannot be joined "
            f"exactly: rows {list(self.parts or ())} of one matrix. {REMEDY}"
        )

    def piece(self, key: str, rows: slice = EVERY) -> Tensor:
        """Return one tensor of `form`, or rows of it along dimension 0, from the sources that they are made of."""
        if self.stacked:
            return torch.stack([self._of_matrix(key, _numbers(ranges)) for ranges in self.matrices[rows]])
        complete = _numbers(self.matrices[0])
        return self._of_matrix(key, complete[rows]) if self._by_rows(key) else self._of_matrix(key, complete)[rows]

    def _by_rows(self, key: str) -> bool:
        return self.form.pieces(*self.shape[-2:])[key].by_rows

    def _of_matrix(self, key: str, rows: Tensor) -> Tensor:
        if not self._by_rows(key):
            pieces = [self.sources[s].piece(key) for s, _ in self._runs(rows)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        sources = self._source_of(rows)
        merged: Tensor | None = None
        for s in sources.unique().tolist():
            chosen = sources == s
            own = rows[chosen] - self.starts[s]
            first, last = int(own.min()), int(own.max()) + 1
            piece = _rows_of_piece(self.sources[s], self.form, key, slice(first, last))
            merged = piece.new_empty(len(rows), *piece.shape[1:]) if merged is None else merged
            merged[chosen] = piece[own - first]
        assert merged is not None
        return merged


def _rows_of_piece(source: QuantizedWeight, form: Format, key: str, rows: slice) -> Tensor:
    """Return rows of a tensor of `form`, which has one for each row of the weight, from a source in its own format."""
    if isinstance(source.form, NF4) and source.form != form and key == "scales":
        return as_bytes(source.form.scales(source.read()))[rows]
    if source.form.pieces(*source.shape)[key].by_rows:
        return source.piece(key, rows)
    return source.piece(key).expand(source.shape[0], -1)[rows]  # one scale of the matrix, for each row


def _numbers(ranges: Sequence[range]) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges])


def _ranges(rows: Tensor) -> tuple[range, ...]:
    """Return the numbers as ranges of consecutive ones, which need less memory."""
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    return tuple(range(int(run[0]), int(run[-1]) + 1) for run in rows.tensor_split(breaks))


def merged(
    convert: Convert, keys: Sequence[str], name: str, shape: tuple[int, ...], weights: Mapping[str, QuantizedWeight]
) -> MergedWeight | None:
    """Return the parameter `name` as a merge of quantized weights; None if none of its tensors is quantized.

    Args:
        convert: runs transformers' converter on tensors by the folder's key, and returns them by the module's name.
        keys: the tensors of the folder that it is made of.
        shape: of the parameter.
        weights: the quantized weights of the folder.
    """
    sources = [weights[key] for key in keys if key in weights]
    if not sources:
        return None
    if plain := [key for key in keys if key not in weights]:
        raise CheckpointError(
            f"{name} is merged of quantized weights and of plain ones, such as {sources[0].name} and {plain[0]}, which "
            f"no one format holds. {REMEDY}"
        )
    refused = CheckpointError(
        f"{name} is merged of {len(sources)} quantized weights, such as {keys[0]}, in another way than by rows. "
        f"{REMEDY}"
    )
    if any(len(source.shape) != 2 or source.transposed for source in sources):
        raise refused
    first, numbers = 0, {}
    for source in sources:  # two columns: which of the result's dimensions are columns can be seen
        count = torch.arange(first, first + source.shape[0])
        numbers[source.name] = torch.stack((2 * count, 2 * count + 1), -1)
        first += source.shape[0]
    try:
        result = convert(numbers.__getitem__)[name]
    except (RuntimeError, ValueError):
        raise refused from None
    if not _rows_are_whole(result):
        result, shape = result.mT, (*shape[:-2], shape[-1], shape[-2])
    if not _rows_are_whole(result) or tuple(result.shape[:-1]) != shape[:-1] or sources[0].shape[1] != shape[-1]:
        raise refused
    rows = result[..., 0] // 2
    each = tuple(_ranges(one) for one in rows.reshape(-1, rows.shape[-1]))
    weight = MergedWeight(name, tuple(sources), each, stacked=rows.ndim > 1)
    assert weight.form  # raised here where there is none
    return weight


def _rows_are_whole(numbers: Tensor) -> bool:
    even = numbers[..., :1]
    return numbers.shape[-1] == 2 and torch.equal(numbers[..., 1:], even + 1) and not bool((even % 2).any())
