"""An index on disk: documents and their rows, scored against queries without reading more than is needed.

score(query, document) = Σ_modules ⟨query, document⟩: positive where training on the document lowers the loss of the
query, as far as the curvature describes the loss.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from treering.core.errors import CheckpointError, ConfigError, DataError
from treering.sketches.best import BestDocuments
from treering.sketches.encoding import decode_module
from treering.sketches.listing import BUILDING, NAME, read_index
from treering.sketches.recipe import IndexModule, IndexRecipe
from treering.sketches.scoring import Scorer
from treering.sketches.shards import REMEDY, ShardEntry, ShardReader
from treering.store.untrusted import in_folder

PAGE = 1 << 23  # scores that are in memory at once
OPEN = 64  # shards that are mapped at once: there may be more of them than files may be open


@dataclass(frozen=True, kw_only=True)
class IndexScores:
    """Scores of an index.

    Attributes:
        values: [documents, Q]; with `top`, the highest of each query [Q, top].
        documents: with `top`, the numbers of these documents [Q, top]; else None.
    """

    values: Tensor
    documents: Tensor | None = None


def open_index(folder: str | Path) -> "Index":
    """Return the index of a folder. Headers and sizes are checked now, the data of a shard when it is first used."""
    folder = Path(folder)
    path = in_folder(folder, NAME) if folder.is_dir() else None
    if path is None:
        unfinished = folder.is_dir() and in_folder(folder, BUILDING) is not None
        state = "an unfinished index; run its build again, which continues" if unfinished else f"no {NAME}; build one"
        raise CheckpointError(f"{folder} holds {state}: treering influence build … --to {folder}")
    recipe, entries = read_index(path)
    index = Index(folder, recipe, entries)
    for number in range(len(entries)):
        index.shard(number, check=False)
    return index


class Index:
    """What `open_index` returns. Documents are numbered in the order of shards.

    Attributes:
        recipe: what the rows were made from; `check` compares it with that of a query.
        documents, tokens, bytes: how many.
    """

    def __init__(self, folder: Path, recipe: IndexRecipe, entries: Sequence[ShardEntry]):
        self.folder, self.recipe, self.entries = folder, recipe, tuple(entries)
        self.starts = [0]
        for entry in entries:
            self.starts.append(self.starts[-1] + entry.documents)
        self.documents, self.tokens = self.starts[-1], sum(entry.tokens for entry in entries)
        self.bytes = sum(entry.bytes for entry in entries)
        self._checked: set[int] = set()
        self._open: dict[int, ShardReader] = {}
        self._ids = lru_cache(maxsize=8)(lambda number: self.shard(number).ids)

    def check(self, recipe: IndexRecipe) -> None:
        """Raise CheckpointError unless queries of this recipe can be scored: before any gradient is computed."""
        self.recipe.check(recipe, str(self.folder))

    def check_data(self) -> None:
        """Read everything, and raise CheckpointError where a shard has other values than were written."""
        for number in range(len(self.entries)):
            self.shard(number)

    def ids(self, documents: Sequence[int] | Tensor) -> list[str]:
        """Return the ids of documents by their numbers."""
        places = [self._place(int(document)) for document in documents]
        return [self._ids(shard)[row] for shard, row in places]

    def all_ids(self) -> Iterator[str]:
        """Yield the ids of all documents."""
        for number in range(len(self.entries)):
            yield from self.shard(number).ids

    def token_counts(self) -> Tensor:
        """Return the number of tokens of each document [documents], int64."""
        return torch.cat([self.shard(number).tokens for number in range(len(self.entries))])

    def score(
        self,
        queries: Mapping[str, Tensor],
        *,
        top: int | None = None,
        modules: Sequence[str] | None = None,
        unit: bool = False,
    ) -> IndexScores:
        """Return the scores of all documents, or the highest of each query.

        Args:
            queries: [Q, numbers] of each module that is scored, from `RowSums.query_rows` with the recipe of the index.
            top: how many documents of each query; None: all scores. Negative queries find the most harmful.
            modules: of these alone; default: all of the index.
            unit: the cosine of rows in place of their product.
        """
        if top is not None and (type(top) is not int or top < 1):
            raise ConfigError(f"top is {top!r}; it is a number from 1", field="top")
        pages = self.score_pages(queries, modules=modules, unit=unit)
        if top is None:
            return IndexScores(values=torch.cat([values for _, values in pages]))
        best: BestDocuments | None = None
        for start, values in pages:
            best = best or BestDocuments(values.shape[1], min(top, self.documents))
            best.add(start, values)
        assert best is not None, "an index has documents"
        return IndexScores(values=best.values, documents=best.documents)

    def score_pages(
        self, queries: Mapping[str, Tensor], *, modules: Sequence[str] | None = None, unit: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Return an iterator over (first document, scores [n, Q]), for files of scores that do not fit in memory."""
        used = self._queries(queries, modules)
        lengths = None
        if unit:
            self._refuse_one_sided("unit", "a cosine")
            lengths = sum(q.double().square().sum(1) for q in used.values()).sqrt()  # type: ignore[union-attr]
        return self._pages(Scorer(self.recipe, used), lengths)

    def by_module(
        self, queries: Mapping[str, Tensor], documents: Sequence[int] | Tensor, *, modules: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the scores [n, Q] that each module adds to those of some documents."""
        scorer = Scorer(self.recipe, self._queries(queries, modules))
        return scorer.by_module(self._chosen(documents))

    def self_influence(self, *, modules: Sequence[str] | None = None) -> Tensor:
        """Return the score of each document with itself [documents], float32: the squared length of its row."""
        self._refuse_one_sided("kind", "a document's score with itself")
        scorer = Scorer(self.recipe, {m.name: torch.empty(0, m.numbers) for m in self._modules(modules)})
        return torch.cat([scorer.squares(page).float() for _, page in self._shards(1)])

    def rows(self, documents: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Return the rows [n, numbers] of documents by module, float32; of two-sided kinds they are queries, too."""
        result: dict[str, list[Tensor]] = {module.name: [] for module in self.recipe.modules}
        for shard, some in self._chosen(documents):
            for name, x in self._decoded(shard, some):
                result[name].append(x)
        sizes = {module.name: module.numbers for module in self.recipe.modules}
        return {name: torch.cat(found) if found else torch.empty(0, sizes[name]) for name, found in result.items()}

    def dense(self, start: int, stop: int) -> Tensor:
        """Return the rows [stop − start, numbers of all modules] of some documents, float32: for libraries that search
        nearest neighbours by inner product."""
        if not 0 <= start <= stop <= self.documents:
            raise DataError(f"documents {start} to {stop} were asked for, and the index has {self.documents}")
        result = torch.empty(stop - start, self.recipe.numbers)
        done = start
        while done < stop:
            number, row = self._place(done)
            last, offset = min(stop, self.starts[number + 1]), 0
            for _, x in self._decoded(self.shard(number), slice(row, row + last - done)):
                result[done - start : last - start, offset : offset + x.shape[1]] = x
                offset += x.shape[1]
            done = last
        return result

    def shard(self, number: int, check: bool = True) -> ShardReader:
        """Return a shard, mapped; with `check`, compared with its digest once."""
        if number not in self._open:
            self._open = dict(list(self._open.items())[-OPEN + 1 :])
            self._open[number] = self._opened(self.entries[number])
        reader = self._open[number]
        if check and number not in self._checked:
            reader.check_data()
            self._checked.add(number)
        return reader

    def _opened(self, entry: ShardEntry) -> ShardReader:
        path = in_folder(self.folder, entry.file)
        if path is None:
            raise CheckpointError(f"{self.folder} lacks {entry.file}, which its {NAME} names; {REMEDY}")
        reader = ShardReader(path, self.recipe)
        if (reader.digest, reader.documents, path.stat().st_size) != (entry.digest, entry.documents, entry.bytes):
            raise CheckpointError(f"{path} is not the file that {NAME} lists: its digest or size differs; {REMEDY}")
        return reader

    def _pages(self, scorer: Scorer, lengths: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        for first, page in self._shards(scorer.count):
            values = scorer.scores(page)
            if lengths is not None:
                both = scorer.squares(page).sqrt()[:, None] * lengths
                values = torch.where(both > 0, values / both, 0)
            yield first, values.float()

    def _shards(self, queries: int) -> Iterator[tuple[int, list[tuple[ShardReader, slice | Tensor]]]]:
        """Yield (first document, shards) of whose documents all scores fit into memory; large shards in parts."""
        most = max(1, PAGE // max(1, queries))
        page: list[tuple[ShardReader, slice | Tensor]] = []
        first = held = 0
        for number, entry in enumerate(self.entries):
            for start in range(0, entry.documents, most):
                count = min(most, entry.documents - start)
                if page and (held + count > most or len(page) == OPEN):
                    yield first, page
                    first, page, held = first + held, [], 0
                page.append((self.shard(number), slice(start, start + count)))
                held += count
        yield first, page

    def _chosen(self, documents: Sequence[int] | Tensor) -> list[tuple[ShardReader, slice | Tensor]]:
        """Return rows of documents, those that follow one another in one shard together."""
        groups: list[tuple[int, list[int]]] = []
        for shard, row in (self._place(int(document)) for document in documents):
            if not groups or groups[-1][0] != shard:
                groups.append((shard, []))
            groups[-1][1].append(row)
        return [(self.shard(shard), torch.tensor(rows)) for shard, rows in groups]

    def _decoded(self, shard: ShardReader, rows: slice | Tensor) -> Iterator[tuple[str, Tensor]]:
        scales = shard.tensor("scales")
        for number, module in enumerate(self.recipe.modules):
            stored = {kind: shard.tensor(f"{kind}.{number}")[rows] for kind in self.recipe.stored(module)}
            stored["scales"] = scales[number, rows]
            yield module.name, decode_module(self.recipe, module, stored)

    def _place(self, document: int) -> tuple[int, int]:
        if not 0 <= document < self.documents:
            raise DataError(f"document {document} was asked for, and {self.folder} has {self.documents}, from 0")
        number = bisect_right(self.starts, document) - 1
        return number, document - self.starts[number]

    def _modules(self, names: Sequence[str] | None) -> list[IndexModule]:
        known = {module.name: module for module in self.recipe.modules}
        if unknown := [name for name in names or () if name not in known]:
            raise ConfigError(
                f"{unknown[0]} is not in {self.folder}, which has {len(known)} modules: "
                f"{', '.join(list(known)[:3])}, …",
                field="modules",
            )
        chosen = [module for name, module in known.items() if names is None or name in names]
        if not chosen:
            raise ConfigError("no module was given to score; name one, or leave modules out", field="modules")
        return chosen

    def _queries(self, queries: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[str, Tensor]:
        used: dict[str, Tensor] = {}
        for module in self._modules(names):
            x = queries.get(module.name)
            count = next(iter(used.values())).shape[0] if used else None
            if x is None or x.ndim != 2 or x.shape[1] != module.numbers or count not in (None, len(x)):
                found = "none" if x is None else f"those of {tuple(x.shape)}"
                raise DataError(
                    f"{module.name} has rows of {module.numbers} numbers in {self.folder}, and the queries have "
                    f"{found}; make queries with the recipe of the index, [queries, numbers] of each module"
                )
            if x.numel() and not all(map(math.isfinite, x.aminmax())):  # one pass, where isfinite takes four
                bad = int((~torch.isfinite(x).all(1)).nonzero()[0])
                raise DataError(f"the gradient of query {bad} is not finite in {module.name}; compute in a wider dtype")
            used[module.name] = x.detach().cpu()
        return used

    def _refuse_one_sided(self, field: str, what: str) -> None:
        if not self.recipe.settings.two_sided:
            raise ConfigError(
                f"{what} needs documents and queries that are whitened alike, and {self.folder} is of kind exact, "
                "which applies the curvature to queries alone; use kind: psift or eigen-topk, or curvature: identity",
                field=field,
            )
