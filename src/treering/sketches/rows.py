"""Rows of documents from pairs (a, g) of their tokens: Σ_t (M_S g_t)(M_A a_t)ᵀ over the tokens of each document.

T tokens, N outputs, M inputs. Several documents lie one after the other in a packed row, and a document may come in
pieces: of a tiled layer, of several rows, of the ranks that share a sequence. Sums are linear, so pieces are added.
What is not linear (the whitening is, the largest coordinates and the quantisation are not) happens in `encode`, after
the last piece.

A document's sum depends on its own tokens alone, bit for bit on the CPU, whatever lies before or behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from treering.core.errors import DataError
from treering.core.full_precision import full_precision
from treering.sketches.maps import ModuleMap

SHORT = 8  # tokens: pieces up to this length are multiplied in one batch
CHUNK = 128  # tokens of a chunk, where pieces are multiplied in one batch whatever their length
LARGE = 1 << 16  # numbers of a document's sum, from which its pieces are multiplied one by one on a card, too


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
        self.add_mapped(module, mapped.map_inputs(a_TM.detach()), mapped.map_gradients(g_TN.detach()), spans)

    def add_mapped(self, module: str, right: Tensor, left: Tensor, spans: TokenSpans) -> None:
        """Add pairs of tokens whose inputs, `right`, and gradients, `left`, were mapped."""
        mapped, dtype = self.maps[module], torch.promote_types(left.dtype, right.dtype)
        new = module not in self.sums
        if new:
            self.sums[module] = left.new_empty(self.documents, mapped.rows, mapped.columns, dtype=dtype)
        add_products(self.sums[module], left.to(dtype), right.to(dtype), spans, empty=new)

    def documents_rows(self, *, used_up: bool = False) -> dict[str, Tensor]:
        """Return the numbers [documents, rows · columns] of each module, as an index keeps them before encoding.

        Args:
            used_up: the numbers take the memory of the sums, which are not used again.
        """
        return {name: self.maps[name].document(self.of(name), in_place=used_up) for name in self.maps}

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


def add_products(sums: Tensor, left_TP: Tensor, right_TQ: Tensor, spans: TokenSpans, *, empty: bool = False) -> None:
    """Add Σ_t left_t right_tᵀ over each span to `sums` [documents, P, Q], in place.

    Args:
        empty: nothing is added up in `sums` yet, whatever is in their memory.
    """
    lengths = len(left_TP), len(right_TQ)
    if lengths[0] != lengths[1] or (spans.stops and max(spans.stops) > lengths[0]):
        reach = max(spans.stops, default=0)
        raise DataError(
            f"{lengths[1]} inputs and {lengths[0]} gradients were given for spans of {reach} tokens; give both of the "
            "same tokens"
        )
    # On a card many small products cost their launches, and large ones nothing: those are multiplied one by one.
    one_by_one = sums.device.type == "cpu" or sums.shape[1] * sums.shape[2] >= LARGE
    length = SHORT if one_by_one else CHUNK
    batched, single = _divided(spans, SHORT) if one_by_one else (spans, ())
    written: set[int] = set()
    if empty:
        # What is written by its first product need not be zeroed; whether it is depends on the document alone.
        written = {number for number, _, _ in single} - set(batched.documents)
        for number in range(len(sums)) if written else ():
            if number not in written:
                sums[number].zero_()
        if not written:
            sums.zero_()
    with full_precision():
        for chunk in _chunks(batched, length, sums.device):
            left = torch.where(chunk.real, left_TP[chunk.tokens], 0)
            right = torch.where(chunk.real, right_TQ[chunk.tokens], 0)
            sums[chunk.documents] += torch.bmm(left.mT, right)
        for number, start, stop in single:
            left, right = left_TP[start:stop].mT, right_TQ[start:stop]
            if number in written:
                torch.mm(left, right, out=sums[number])
                written.remove(number)
            else:
                sums[number].addmm_(left, right)


@dataclass(frozen=True, eq=False)
class _TokenChunks:
    """Chunks of `tokens` [chunks, length], of which some are `real` [chunks, length, 1], and their documents [chunks].

    A document has at most one of them: additions to one place at once would have no fixed order.
    """

    documents: Tensor
    tokens: Tensor
    real: Tensor


@lru_cache(maxsize=64)  # all modules of a model have the same spans, and a card would wait for them each time
def _chunks(spans: TokenSpans, length: int, device: torch.device) -> tuple[_TokenChunks, ...]:
    rounds: list[list[tuple[int, int, int]]] = []
    seen: dict[int, int] = {}
    for number, start, stop in zip(spans.documents, spans.starts, spans.stops):
        for begin in range(start, stop, length):
            turn = seen[number] = seen.get(number, -1) + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append((number, begin, stop))
    result = []
    for one in rounds:
        documents, starts, stops = torch.tensor(one).unbind(1)
        tokens = starts[:, None] + torch.arange(length)
        real = (tokens < stops[:, None])[:, :, None]
        tokens = torch.minimum(tokens, stops[:, None] - 1)
        result.append(_TokenChunks(documents.to(device), tokens.to(device), real.to(device)))
    return tuple(result)


@lru_cache(maxsize=64)
def _divided(spans: TokenSpans, most: int) -> tuple[TokenSpans, tuple[tuple[int, int, int], ...]]:
    """Return the spans of at most so many tokens, and the others."""
    pieces = list(zip(spans.documents, spans.starts, spans.stops))
    short = [piece for piece in pieces if piece[2] - piece[1] <= most]
    documents, starts, stops = zip(*short) if short else ((), (), ())
    long = tuple(piece for piece in pieces if piece[2] - piece[1] > most)
    return TokenSpans(documents=documents, starts=starts, stops=stops), long
