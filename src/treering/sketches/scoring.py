"""Scores of the rows of one shard against queries, block by block: Σ_modules ⟨document, query⟩.

D numbers of a module, Q queries. Blocks of rows are converted to float32 in one buffer that stays in the cache of a
core, and multiplied there; scales are applied to the products, of which there are Q a row, not D. Of the largest
coordinates only the entries are read: each picks a row of the queries, transposed [D, Q]. Products of a module are
float32 sums; modules are added in float64.
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

BLOCK = 1 << 18  # numbers of a block: 1 MiB of float32
ROWS, ENTRIES = 1024, 1 << 16  # most rows of a block, and most entries of one


@dataclass(frozen=True, kw_only=True)
class ScoredModule:
    """A module that is scored: its number in the index, and its queries, transposed [D, Q]."""

    number: int
    module: IndexModule
    queries_DQ: Tensor


def scored_modules(recipe: IndexRecipe, queries: Mapping[str, Tensor]) -> list[ScoredModule]:
    """Return the modules that have queries [Q, D], in the order of the index."""
    return [
        ScoredModule(number=i, module=m, queries_DQ=queries[m.name].float().mT.contiguous())
        for i, m in enumerate(recipe.modules)
        if m.name in queries
    ]


class ShardScorer:
    """Scores the rows of shards of one index against the queries of `modules`."""

    def __init__(self, recipe: IndexRecipe, modules: Sequence[ScoredModule]):
        self.recipe, self.modules = recipe, modules
        self.sparse, self.storage = recipe.settings.kind == "eigen-topk", recipe.settings.storage
        self.queries = modules[0].queries_DQ.shape[1]
        widest = max(m.module.numbers for m in modules)
        if self.sparse:
            self.rows = max(1, min(ROWS, ENTRIES // max(recipe.stored(m.module)["gaps"][0] for m in modules)))
        else:
            self.rows = max(1, min(ROWS, BLOCK // widest))
        self.buffer = torch.empty(0 if self.sparse else max(self.rows * widest, 1) if widest <= BLOCK else BLOCK)

    def scores(self, shard: ShardReader, start: int, stop: int) -> Tensor:
        """Return the scores [stop − start, Q] of some rows, float32."""
        total = torch.zeros(stop - start, self.queries, dtype=torch.float64)
        for first in range(start, stop, self.rows):
            last = min(stop, first + self.rows)
            part = total[first - start : last - start]
            for one in self.modules:
                part.addcmul_(self._products(shard, one, first, last), _scales(shard, one, first, last))
        return total.float()

    def by_module(self, shard: ShardReader, start: int, stop: int) -> Tensor:
        """Return the scores [modules, stop − start, Q] of some rows, float32."""
        result = torch.empty(len(self.modules), stop - start, self.queries)
        for first in range(start, stop, self.rows):
            last = min(stop, first + self.rows)
            for row, one in zip(result, self.modules):
                row[first - start : last - start] = self._products(shard, one, first, last) * _scales(
                    shard, one, first, last
                )
        return result

    def squares(self, shard: ShardReader, start: int, stop: int) -> Tensor:
        """Return the squared lengths [stop − start] of some rows, float64."""
        total = torch.zeros(stop - start, dtype=torch.float64)
        for first in range(start, stop, self.rows):
            last = min(stop, first + self.rows)
            for one in self.modules:
                scales = _scales(shard, one, first, last)[:, 0].double()
                total[first - start : last - start] += self._squares(shard, one, first, last) * scales**2
        return total

    def _products(self, shard: ShardReader, one: ScoredModule, start: int, stop: int) -> Tensor:
        """Return the products with queries [stop − start, Q], before scales."""
        if self.sparse:
            gaps, values = (shard.tensor(f"{kind}.{one.number}")[start:stop] for kind in ("gaps", "values"))
            return entry_products(gaps, values, one.queries_DQ, str(shard.path))
        return dense_products(self._codes(shard, one, start, stop), self.storage, one.queries_DQ, self.buffer)

    def _squares(self, shard: ShardReader, one: ScoredModule, start: int, stop: int) -> Tensor:
        """Return the squared lengths [stop − start] before scales, float64."""
        if self.sparse:
            return shard.tensor(f"values.{one.number}")[start:stop].float().square_().sum(1, dtype=torch.float64)
        total = torch.zeros(stop - start, dtype=torch.float64)
        wide = torch.float64 if self.storage == "float32" else None  # squares of small numbers would vanish
        stored = self._codes(shard, one, start, stop)
        for _, units in blocks(stored, self.storage, one.module.numbers, self.buffer):
            total += torch.linalg.vector_norm(units, dim=1, dtype=wide).double() ** 2
        return total

    def _codes(self, shard: ShardReader, one: ScoredModule, start: int, stop: int) -> Tensor:
        return shard.tensor(f"codes.{one.number}")[start:stop]


def dense_products(stored: Tensor, storage: Storage, queries_DQ: Tensor, buffer: Tensor) -> Tensor:
    """Return the products [n, Q] of codes [n, width] with queries, float32, before scales."""
    numbers, queries = queries_DQ.shape
    result = None
    for first, units in blocks(stored, storage, numbers, buffer):
        product = units @ queries_DQ[first : first + units.shape[1]]
        result = product if result is None else result.add_(product)
    return stored.new_zeros(len(stored), queries, dtype=torch.float32) if result is None else result


def entry_products(gaps: Tensor, values: Tensor, queries_DQ: Tensor, where: str) -> Tensor:
    """Return the products [n, Q] of entries [n, entries] with queries, float32, before scales."""
    places = topk.positions(gaps, values, len(queries_DQ))
    if places.numel() and int(places[:, -1].max()) >= len(queries_DQ):
        raise CheckpointError(f"{where} names coordinates that its modules do not have; {REMEDY}")
    return torch.nn.functional.embedding_bag(places, queries_DQ, mode="sum", per_sample_weights=values.float())


def blocks(stored: Tensor, storage: Storage, numbers: int, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, codes as float32) of rows, as many columns as fit into `buffer`, which is used again."""
    if storage == "float32":
        yield 0, stored
        return
    columns = min(numbers, len(buffer) // max(1, len(stored)))
    columns -= columns % 2 if columns < numbers else 0
    share = 2 if storage == "int4" else 1
    for first in range(0, numbers, columns):
        some = min(columns, numbers - first)
        out = buffer[: len(stored) * some].view(len(stored), some)
        yield first, codes.units_of(stored[:, first // share : -(-(first + some) // share)], some, storage, out)


def _scales(shard: ShardReader, one: ScoredModule, start: int, stop: int) -> Tensor:
    return shard.tensor("scales")[one.number, start:stop, None].float()
