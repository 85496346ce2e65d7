"""Scores of the rows of one shard against queries, block by block: Σ_modules ⟨document, query⟩.

D numbers of a module, Q queries. Blocks of codes are converted to float64 in one buffer that stays in the cache of a
core, and multiplied there by queries in fixed point: all products and sums are integers below 2^53, so that they are
exact, in any order, on any number of threads and any machine, and copies of a document have equal scores. That costs a
quarter of the speed of float32. Scales are applied to the sums, of which there are Q a row, not D.

Of the largest coordinates only the entries are read: each picks a row of the queries, transposed [D, Q]. Products are
added in float32, one document by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.sketches import codes, topk
from treering.sketches.recipe import IndexModule, IndexRecipe
from treering.sketches.settings import Storage
from treering.sketches.shards import REMEDY, ShardReader

BLOCK = 1 << 17  # numbers of a block: 1 MiB of float64
ROWS, ENTRIES = 1024, 1 << 16  # most rows of a block, and most entries of one


Chosen = Sequence[tuple[ShardReader, slice | Tensor]]  # rows of shards


@dataclass(frozen=True, kw_only=True)
class ScoredModule:
    """A module that is scored.

    Attributes:
        number: of the module in the index.
        queries_DQ: transposed; of dense kinds in units of `steps`, float64; else float32.
        steps: [Q], float64.
    """

    number: int
    module: IndexModule
    queries_DQ: Tensor
    steps: Tensor


def fixed_point(x_DQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers [D, Q], float64, and steps [Q], powers of 2, whose product is x to 29 bits or more of the
    largest: so large that sums of `BLOCK` products with codes stay below 2^53."""
    D = x_DQ.shape[0]
    bits = 53 - 7 - (min(D, BLOCK) - 1).bit_length()
    most = x_DQ.double().abs().amax(0) if D else x_DQ.new_zeros(x_DQ.shape[1], dtype=torch.float64)
    steps = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - bits)
    return torch.round(x_DQ.double() / steps), steps


class Scorer:
    """Scores rows of an index against queries [Q, numbers] by module.

    Module by module, whose queries stay in the cache and are transposed alone: those of all modules would need as much
    memory again as the queries. Inside a module by shards, and by blocks of rows.
    """

    def __init__(self, recipe: IndexRecipe, queries: Mapping[str, Tensor]):
        self.queries = queries
        self.modules = [(i, m) for i, m in enumerate(recipe.modules) if m.name in queries]
        self.count = len(next(iter(queries.values())))
        self.sparse, self.storage = recipe.settings.kind == "eigen-topk", recipe.settings.storage
        self.buffer = torch.empty(0 if self.sparse else BLOCK, dtype=torch.float64)

    def scores(self, chosen: Chosen) -> Tensor:
        """Return the scores [n, Q] of rows, float64."""
        total = torch.zeros(_count(chosen), self.count, dtype=torch.float64)
        for number, module in self.modules:
            self._add_scores(total, self._prepared(number, module), chosen)
        return total

    def by_module(self, chosen: Chosen) -> dict[str, Tensor]:
        """Return the scores [n, Q] of rows in each module, float32."""
        result = {}
        for number, module in self.modules:
            total = torch.zeros(_count(chosen), self.count, dtype=torch.float64)
            self._add_scores(total, self._prepared(number, module), chosen)
            result[module.name] = total.float()
        return result

    def squares(self, chosen: Chosen) -> Tensor:
        """Return the squared lengths [n] of rows, float64."""
        total = torch.zeros(_count(chosen), dtype=torch.float64)
        for number, module in self.modules:
            for part, (shard, rows) in zip(_split(total, chosen), chosen):
                if self.sparse:
                    values = shard.tensor(f"values.{number}")[rows]
                    squares = values.float().square_().sum(1, dtype=torch.float64)
                else:
                    stored = shard.tensor(f"codes.{number}")[rows]
                    squares = dense_squares(stored, module.numbers, self.storage, self.buffer)
                part.addcmul_(squares, _scales(shard, number, rows).square_())
        return total

    def _prepared(self, number: int, module: IndexModule) -> ScoredModule:
        x = self.queries[module.name].mT
        steps = torch.ones(x.shape[1], dtype=torch.float64)
        if self.sparse:
            x = x.float()
        elif self.storage in ("int8", "int4"):
            x, steps = fixed_point(x)
        else:
            x = x.double()
        return ScoredModule(number=number, module=module, queries_DQ=x.contiguous(), steps=steps)

    def _add_scores(self, total: Tensor, one: ScoredModule, chosen: Chosen) -> None:
        for part, (shard, rows) in zip(_split(total, chosen), chosen):
            if self.sparse:
                gaps, values = (shard.tensor(f"{kind}.{one.number}")[rows] for kind in ("gaps", "values"))
                products = entry_products(gaps, values, one.queries_DQ, str(shard.path)).double()
            else:
                stored = shard.tensor(f"codes.{one.number}")[rows]
                products = dense_products(stored, self.storage, one.queries_DQ, self.buffer)
            part.addcmul_(products, _scales(shard, one.number, rows)[:, None] * one.steps)


def dense_products(stored: Tensor, storage: Storage, queries_DQ: Tensor, buffer: Tensor) -> Tensor:
    """Return the products [n, Q] of codes [n, width] with queries, float64, before scales.

    Args:
        queries_DQ: float64.
        buffer: float64, which is overwritten.
    """
    numbers, queries = queries_DQ.shape
    products = queries_DQ.new_zeros(len(stored), queries)
    for some, first, units in blocks(stored, numbers, storage, buffer):
        part = products[some]
        if units.shape[1] == numbers:
            torch.mm(units, queries_DQ, out=part)
        else:
            part.addmm_(units, queries_DQ[first : first + units.shape[1]])
    return products


def dense_squares(stored: Tensor, numbers: int, storage: Storage, buffer: Tensor) -> Tensor:
    """Return the squared lengths [n] of codes, float64, before scales."""
    squares = torch.zeros(len(stored), dtype=torch.float64)
    for some, _, units in blocks(stored, numbers, storage, buffer):
        squares[some] += units.square_().sum(1)
    return squares


def entry_products(gaps: Tensor, values: Tensor, queries_DQ: Tensor, where: str) -> Tensor:
    """Return the products [n, Q] of entries [n, entries] with queries, float32, before scales."""
    products = queries_DQ.new_empty(len(gaps), queries_DQ.shape[1])
    rows = max(1, ENTRIES // max(1, gaps.shape[1]))
    for start in range(0, len(gaps), rows):
        some = slice(start, start + rows)
        places = topk.positions(gaps[some], values[some], len(queries_DQ))
        if places.numel():
            low, high = (int(place) for place in places.aminmax())
            if low < 0 or high >= len(queries_DQ):
                raise CheckpointError(f"{where} names coordinates that its modules do not have; {REMEDY}")
        products[some] = torch.nn.functional.embedding_bag(
            places, queries_DQ, mode="sum", per_sample_weights=values[some].float()
        )
    return products


def blocks(stored: Tensor, numbers: int, storage: Storage, buffer: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (rows, first column, their codes as float64), as many as fit into `buffer`, which is used again."""
    rows, columns = max(1, min(ROWS, len(buffer) // numbers)), min(numbers, len(buffer))
    share = 2 if storage == "int4" else 1
    for start in range(0, len(stored), rows):
        some = stored[start : start + rows]
        for first in range(0, numbers, columns):
            last = min(numbers, first + columns)
            out = buffer[: len(some) * (last - first)].view(len(some), last - first)
            part = some if last - first == numbers else some[:, first // share : -(-last // share)]
            yield slice(start, start + rows), first, codes.units_of(part, last - first, storage, out)


def _scales(shard: ShardReader, number: int, rows: slice | Tensor) -> Tensor:
    return shard.tensor("scales")[number, rows].double()


def _count(chosen: Chosen) -> int:
    return sum(len(shard.tensor("tokens")[rows]) for shard, rows in chosen)


def _split(total: Tensor, chosen: Chosen) -> tuple[Tensor, ...]:
    return total.split([len(shard.tensor("tokens")[rows]) for shard, rows in chosen])
