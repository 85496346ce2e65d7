"""Scores of rows of an index against queries, block by block: Σ_modules ⟨document, query⟩.

D numbers of a module, Q queries. Blocks of codes are converted to float64 in one buffer that stays in the cache of a
core, and multiplied there by queries in fixed point: all products and sums are integers below 2^53, so that they are
exact, in any order, on any number of threads and any machine, and copies of a document have equal scores. That costs a
quarter of the speed of float32. Scales are applied to the sums, of which there are Q a row, not D.

Of the largest coordinates only the entries are read: each picks a row of the queries, transposed [D, Q]. Products are
added in float32, one document by itself.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.sketches import codes, topk
from treering.sketches.recipe import IndexModule, IndexRecipe
from treering.sketches.settings import Storage
from treering.sketches.shards import REMEDY, ShardReader

BLOCK = 1 << 17  # numbers of a block: 1 MiB of float64
ROWS, ENTRIES = 1024, 1 << 16  # most rows of a block, and most entries of one
FEW = 4  # how many numbers of a query there are for each entry, where only those that are needed are transposed

Chosen = Sequence[tuple[ShardReader, slice | Tensor]]  # rows of shards


def fixed_point(x_QD: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers [Q, D], float64, and steps [Q], powers of 2, whose product is x to 29 bits or more of the
    largest: so large that sums of `BLOCK` products with codes stay below 2^53."""
    bits = 53 - 7 - (min(x_QD.shape[1], BLOCK) - 1).bit_length()
    low, high = x_QD.aminmax(dim=1)
    most = torch.maximum(high, -low).double()
    steps = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - bits)
    return (x_QD.double() / steps[:, None]).round_(), steps


class Scorer:
    """Scores rows of an index against queries [Q, numbers] by module.

    Module by module, whose queries stay in the cache and are transposed alone: those of all modules would need as much
    memory again as the queries. Inside a module by shards, and by blocks of rows.
    """

    def __init__(self, recipe: IndexRecipe, queries: Mapping[str, Tensor]):
        self.queries = queries
        self.modules = [(i, m) for i, m in enumerate(recipe.modules) if m.name in queries]
        self.count = len(next(iter(queries.values())))
        self.width = [recipe.stored(m).get("gaps", (0, 0))[0] for m in recipe.modules]
        self.sparse, self.storage = recipe.settings.kind == "eigen-topk", recipe.settings.storage
        self.buffer = torch.empty(0 if self.sparse else BLOCK, dtype=torch.float64)

    def scores(self, chosen: Chosen) -> Tensor:
        """Return the scores [n, Q] of rows, float64."""
        total = torch.zeros(_count(chosen), self.count, dtype=torch.float64)
        for number, module in self.modules:
            self._add_scores(total, number, module, chosen)
        return total

    def by_module(self, chosen: Chosen) -> dict[str, Tensor]:
        """Return the scores [n, Q] of rows in each module, float32."""
        result = {}
        for number, module in self.modules:
            total = torch.zeros(_count(chosen), self.count, dtype=torch.float64)
            self._add_scores(total, number, module, chosen)
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

    def _add_scores(self, total: Tensor, number: int, module: IndexModule, chosen: Chosen) -> None:
        """Add the scores [n, Q] of rows in one module to `total`, float64."""
        x_QD = self.queries[module.name]
        add = self._add_entries if self.sparse else self._add_codes
        add(_split(total, chosen), number, x_QD, chosen)

    def _add_codes(self, parts: Sequence[Tensor], number: int, x_QD: Tensor, chosen: Chosen) -> None:
        whole, steps = x_QD, torch.ones(self.count, dtype=torch.float64)
        if self.storage in ("int8", "int4") and self.count:
            whole, steps = fixed_point(x_QD)
        whole = whole.double()
        for part, (shard, rows) in zip(parts, chosen):
            products = dense_products(shard.tensor(f"codes.{number}")[rows], self.storage, whole, self.buffer)
            part.addcmul_(products, _scales(shard, number, rows)[:, None] * steps)

    def _add_entries(self, parts: Sequence[Tensor], number: int, x_QD: Tensor, chosen: Chosen) -> None:
        width = self.width[number]
        # Of a few documents few numbers of the queries are needed, and to transpose all would take most of the time.
        few = FEW * width * sum(len(part) for part in parts) < x_QD.shape[1]
        table = None if few else x_QD.float().mT.contiguous()
        for part, (shard, rows) in zip(parts, chosen):
            gaps, values = (shard.tensor(f"{kind}.{number}")[rows] for kind in ("gaps", "values"))
            for start in range(0, len(gaps), max(1, ENTRIES // width)):
                some = slice(start, start + max(1, ENTRIES // width))
                places = entry_places(gaps[some], values[some], x_QD.shape[1], str(shard.path))
                products = entry_products(places, values[some], x_QD, table)
                part[some].addcmul_(products.double(), _scales(shard, number, rows)[some, None])


def dense_products(stored: Tensor, storage: Storage, queries_QD: Tensor, buffer: Tensor) -> Tensor:
    """Return the products [n, Q] of codes [n, width] with queries, float64, before scales.

    Args:
        queries_QD: float64.
        buffer: float64, which is overwritten.
    """
    queries, numbers = queries_QD.shape
    products = queries_QD.new_zeros(len(stored), queries)
    for some, first, units in blocks(stored, numbers, storage, buffer):
        part = products[some]
        if units.shape[1] == numbers:
            torch.mm(units, queries_QD.mT, out=part)
        else:
            part.addmm_(units, queries_QD[:, first : first + units.shape[1]].mT)
    return products


def dense_squares(stored: Tensor, numbers: int, storage: Storage, buffer: Tensor) -> Tensor:
    """Return the squared lengths [n] of codes, float64, before scales."""
    squares = torch.zeros(len(stored), dtype=torch.float64)
    for some, _, units in blocks(stored, numbers, storage, buffer):
        squares[some] += units.square_().sum(1)
    return squares


def entry_places(gaps: Tensor, values: Tensor, numbers: int, where: str) -> Tensor:
    """Return the coordinates [n, entries] of entries, all of them below `numbers`."""
    places = topk.positions(gaps, values, numbers)
    if places.numel():
        low, high = (int(place) for place in places.aminmax())
        if low < 0 or high >= numbers:
            raise CheckpointError(f"{where} names coordinates that its modules do not have; {REMEDY}")
    return places


def entry_products(places: Tensor, values: Tensor, x_QD: Tensor, table_DQ: Tensor | None) -> Tensor:
    """Return the products [n, Q] of entries [n, entries] with queries, float32, before scales.

    Args:
        table_DQ: the queries, transposed; None: of the coordinates that are used alone. Both give the same bits.
    """
    if table_DQ is None:
        used, places = places.unique(return_inverse=True)
        table_DQ = x_QD[:, used].float().mT.contiguous()
    return torch.nn.functional.embedding_bag(places, table_DQ, mode="sum", per_sample_weights=values.float())


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
