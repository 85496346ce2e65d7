"""Rows of documents from pairs (a, g) of their tokens: Σ_t (M_S g_t)(M_A a_t)ᵀ over the tokens of each document.

T tokens, N outputs, M inputs. Several documents lie one after the other in a packed row, and a document may come in
pieces: of a tiled layer, of several rows, of the ranks that share a sequence. Sums are linear, so pieces are added.
What is not linear (the whitening is, the largest coordinates and the quantisation are not) happens in `encode`, after
the last piece.

A document's sum depends on its own tokens alone, bit for bit on the CPU, whatever lies before or behind it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treering.core.errors import DataError
from treering.core.full_precision import full_precision
from treering.sketches.maps import ModuleMap

SHORT = 8  # tokens: pieces up to this length are multiplied in one batch
CHUNK = 128  # tokens of a chunk, where pieces are multiplied in one batch whatever their length


@dataclass(frozen=True, kw_only=True)
class TokenSpans:
    """The pieces of documents in T tokens: piece i is tokens `starts[i]` to `stops[i]` of document `documents[i]`.

    Documents are numbered inside the group whose rows are summed. Tokens of no piece (padding) are left out.
    """

    documents: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], first: int = 0) -> "TokenSpans":
        """Return the spans of complete documents that lie one after the other, numbered from `first`."""
        stops = [0]
        for length in lengths:
            stops.append(stops[-1] + length)
        numbers = tuple(range(first, first + len(lengths)))
        return cls(documents=numbers, starts=tuple(stops[:-1]), stops=tuple(stops[1:]))

    @classmethod
    def of_tokens(cls, documents_T: Tensor) -> "TokenSpans":
        """Return the spans of tokens whose documents are given, −1 for padding."""
        numbers, lengths = torch.unique_consecutive(documents_T, return_counts=True)
        stops = lengths.cumsum(0)
        real = numbers >= 0
        lists = (x[real].tolist() for x in (numbers, stops - lengths, stops))
        documents, starts, ends = map(tuple, lists)
        return cls(documents=documents, starts=starts, stops=ends)

    def cut(self, start: int, stop: int) -> "TokenSpans":
        """Return the spans of tokens `start` to `stop`, counted from `start`: those of one tile."""
        inside = [
            (number, max(a, start) - start, min(b, stop) - start)
            for number, a, b in zip(self.documents, self.starts, self.stops)
            if a < stop and b > start
        ]
        documents, starts, stops = zip(*inside) if inside else ((), (), ())
        return TokenSpans(documents=documents, starts=starts, stops=stops)


class RowSums:
    """Sums of a group of documents, module by module.

    Args:
        maps: of each module, by name.
        documents: how many the group has; `TokenSpans` number them from 0.

    Example:
        sums = RowSums(maps, documents=3)
        sums.add("model.layers.0.mlp.up_proj.weight", a_TM, g_TN, TokenSpans.of_lengths([40, 12, 60]))
        rows = sums.documents_rows()
    """

    def __init__(self, maps: Mapping[str, ModuleMap], documents: int):
        self.maps, self.documents = dict(maps), documents
        self.sums: dict[str, Tensor] = {}

    def add(self, module: str, a_TM: Tensor, g_TN: Tensor, spans: TokenSpans) -> None:
        """Add pairs of tokens. `a_TM` may be the tokens [T] of an embedding, whose inputs they stand for.

        `g_TN` is the gradient of the sum of a document's losses, not divided by a number of tokens.
        """
        mapped = self.maps[module]
        left, right = mapped.map_gradients(g_TN.detach()), mapped.map_inputs(a_TM.detach())
        dtype = torch.promote_types(left.dtype, right.dtype)
        if module not in self.sums:
            self.sums[module] = left.new_zeros(self.documents, mapped.rows, mapped.columns, dtype=dtype)
        add_products(self.sums[module], left.to(dtype), right.to(dtype), spans)

    def documents_rows(self) -> dict[str, Tensor]:
        """Return the numbers [documents, rows · columns] of each module, as an index keeps them before encoding."""
        return {name: self.maps[name].document(self.of(name)) for name in self.maps}

    def query_rows(self) -> dict[str, Tensor]:
        """Return the numbers of each module for documents that are queries."""
        return {name: self.maps[name].query(self.of(name)) for name in self.maps}

    def of(self, module: str) -> Tensor:
        """Return the sums of a module, kept: zeros where no token reached it, of an expert for example."""
        if module not in self.sums:
            mapped = self.maps[module]
            like = next((x for x in (*self.sums.values(), mapped.left, mapped.right) if x is not None), torch.empty(0))
            self.sums[module] = like.new_zeros(self.documents, mapped.rows, mapped.columns)
        return self.sums[module]


def add_products(sums: Tensor, left_TP: Tensor, right_TQ: Tensor, spans: TokenSpans) -> None:
    """Add Σ_t left_t right_tᵀ over each span to `sums` [documents, P, Q], in place."""
    lengths = len(left_TP), len(right_TQ)
    if lengths[0] != lengths[1] or (spans.stops and max(spans.stops) > lengths[0]):
        reach = max(spans.stops, default=0)
        raise DataError(
            f"{lengths[1]} inputs and {lengths[0]} gradients were given for spans of {reach} tokens; give both of the "
            "same tokens"
        )
    pieces = list(zip(spans.documents, spans.starts, spans.stops))
    with full_precision():
        if sums.device.type != "cpu":
            _add_in_chunks(sums, left_TP, right_TQ, pieces, CHUNK)
            return
        _add_in_chunks(sums, left_TP, right_TQ, [p for p in pieces if p[2] - p[1] <= SHORT], SHORT)
        for number, start, stop in pieces:
            if stop - start > SHORT:
                sums[number].addmm_(left_TP[start:stop].mT, right_TQ[start:stop])


def _add_in_chunks(
    sums: Tensor, left_TP: Tensor, right_TQ: Tensor, pieces: list[tuple[int, int, int]], length: int
) -> None:
    """Add products of spans by chunks of `length` tokens, all of them multiplied at once.

    A round adds at most one chunk to each document: additions to one place at once would have no fixed order.
    """
    offsets = torch.arange(length, device=sums.device)
    for numbers, starts, stops in _rounds(pieces, length):
        first, last = (torch.tensor(x, device=sums.device)[:, None] for x in (starts, stops))
        tokens = first + offsets
        real = (tokens < last)[:, :, None]
        tokens = tokens.clamp_max(len(left_TP) - 1)
        left = torch.where(real, left_TP[tokens], 0)
        right = torch.where(real, right_TQ[tokens], 0)
        sums[torch.tensor(numbers, device=sums.device)] += torch.bmm(left.mT, right)


def _rounds(pieces: list[tuple[int, int, int]], length: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield chunks (documents, starts, stops) of spans, so that no document is twice in one round."""
    rounds: list[tuple[list[int], list[int], list[int]]] = []
    seen: dict[int, int] = {}
    for number, start, stop in pieces:
        for begin in range(start, stop, length):
            turn = seen.get(number, 0)
            seen[number] = turn + 1
            if turn == len(rounds):
                rounds.append(([], [], []))
            for values, value in zip(rounds[turn], (number, begin, stop)):
                values.append(value)
    yield from rounds
