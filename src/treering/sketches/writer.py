"""Writing an index: shard by shard, each by one rank and in any order, listed in index.json at the end.

    index.json                       what readers open; replaced by one rename
    building.json                    the recipe of shards that index.json does not list yet
    shard-00000.safetensors, …       complete from the moment that they have this name; never changed

A writer that is killed leaves complete shards, which the next one with the same recipe keeps. Its bytes are those of a
writer that was not killed. Ranks need a common file system.
"""

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from treering.core.errors import CheckpointError, DataError
from treering.sketches import shards
from treering.sketches.encoding import encode
from treering.sketches.listing import BUILDING, FORMAT, NAME, as_bytes, description, read_index, read_recipe
from treering.sketches.recipe import IndexRecipe
from treering.sketches.shards import EncodedRows, ShardReader
from treering.store import disk
from treering.store.publish import on_first
from treering.store.untrusted import in_folder

_TEMPORARY = re.compile(r"(shard-\d{5,}\.safetensors\.tmp-[0-9a-f]{8}|(index|building)\.json\.tmp)")
_FILES = re.compile(rf"index\.json|building\.json|shard-\d{{5,}}\.safetensors|{_TEMPORARY.pattern}")
SHARD_BYTES, MOST_DOCUMENTS = 64 << 20, 1 << 16


def shard_documents(recipe: IndexRecipe) -> int:
    """Return how many documents a shard should have, so that it has some 64 MiB: a function of the recipe alone."""
    return max(1, min(MOST_DOCUMENTS, SHARD_BYTES // recipe.bytes_of_row))


@contextmanager
def writing(
    folder: str | Path, recipe: IndexRecipe, *, append: bool = False, documents: int = 0
) -> Iterator["IndexWriter"]:
    """Begin to write an index, or continue what a killed writer left. Every rank calls it.

    Args:
        folder: of the index alone.
        recipe: of all its rows.
        append: add shards to an index that is published already, of the same recipe.
        documents: how many will be added, so that a disk that is too small for them is refused now.

    Example:
        with writing("index", recipe) as writer:
            for number, ids in enumerate(plan):
                if number % world == rank and not writer.is_complete(number, ids):
                    with writer.shard(number) as shard:
                        shard.add(ids, tokens, sums.documents_rows())
            writer.publish(len(plan))
    """
    folder = Path(folder)
    on_first(lambda: _begin(folder, recipe, append, documents), f"writing {folder}")
    with disk.writing_in(folder, _TEMPORARY):
        yield IndexWriter(folder, recipe)


class IndexWriter:
    """The writer that `writing` yields. Shards are numbered from `first`, after those that are published already."""

    def __init__(self, folder: Path, recipe: IndexRecipe):
        self.folder, self.recipe = folder, recipe
        published = in_folder(folder, NAME)
        self.published = () if published is None else read_index(published)[1]
        self.first = len(self.published)

    def is_complete(self, number: int, ids: Sequence[str] | None = None) -> bool:
        """Return whether a shard is written; with `ids`, an error where it has other documents than these."""
        path = in_folder(self.folder, shards.name_of(number))
        if path is None:
            return False
        reader = ShardReader(path, self.recipe)
        if ids is not None and (found := reader.ids) != list(ids):
            at = next((i for i, (a, b) in enumerate(zip(found, ids)) if a != b), min(len(found), len(ids)))
            here, there = (x[at][:80] if at < len(x) else "nothing" for x in (found, ids))
            raise CheckpointError(
                f"{path} was written from other documents: {here!r} is at place {at}, where {there!r} is wanted; build "
                "from the same data in the same order, or remove the folder"
            )
        return True

    @contextmanager
    def shard(self, number: int) -> Iterator["ShardWriter"]:
        """Write a shard: its rows are added inside, and it appears at the end. An error leaves nothing of it."""
        if number < self.first:
            raise CheckpointError(
                f"{self.folder / shards.name_of(number)} is published and never changed; write others"
            )
        shard = ShardWriter(self.recipe)
        yield shard
        if not shard.ids:
            raise DataError(f"shard {number} of {self.folder} has no document; leave it out")
        path = self.folder / shards.name_of(number)
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            shards.write(temporary, self.recipe, shard.ids, shard.tokens, shard.rows)
            disk.move(temporary, path, "shard")
            disk.sync(self.folder, "shard")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}; complete shards stay: free some space and run "
                "the same again"
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, first: int) -> None:
        """Remove shards from `first` on that are not published: rows after the last checkpoint of a training run.

        Every rank calls it."""

        def remove() -> None:
            for number in self._unpublished():
                if number >= first:
                    (self.folder / shards.name_of(number)).unlink(missing_ok=True)
            disk.sync(self.folder)

        on_first(remove, f"writing {self.folder}")

    def publish(self, count: int) -> None:
        """List the first `count` shards in index.json, after which readers see them. Every rank calls it."""
        on_first(lambda: self._publish(count), f"writing {self.folder}")

    def _publish(self, count: int) -> None:
        missing = [n for n in range(self.first, count) if in_folder(self.folder, shards.name_of(n)) is None]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of {count} shards, {shards.name_of(missing[0])} first; write "
                "them, then publish"
            )
        if extra := [n for n in self._unpublished() if n >= count]:
            raise CheckpointError(
                f"{self.folder} has {shards.name_of(extra[0])}, which is not among the {count} shards of this build; "
                "drop it, or build from the same data"
            )
        entries = list(self.published)
        for number in range(self.first, count):
            entries.append(ShardReader(self.folder / shards.name_of(number), self.recipe).entry())
        if not entries:
            raise CheckpointError(f"{self.folder} has no shard, and an index without documents is of no use; write one")
        disk.replace(self.folder / NAME, as_bytes(description(self.recipe, entries)))
        (self.folder / BUILDING).unlink(missing_ok=True)

    def _unpublished(self) -> list[int]:
        numbers = [re.fullmatch(r"shard-(\d{5,})\.safetensors", path.name) for path in self.folder.iterdir()]
        return sorted(n for match in numbers if match and (n := int(match[1])) >= self.first)


class ShardWriter:
    """Rows of one shard, encoded as they come."""

    def __init__(self, recipe: IndexRecipe):
        self.recipe = recipe
        self.ids: list[str] = []
        self.tokens: list[int] = []
        self.rows: list[EncodedRows] = []

    def add(self, ids: Sequence[str], tokens: Sequence[int], rows: Mapping[str, Tensor]) -> None:
        """Add documents whose numbers [n, numbers] are given by module."""
        self.add_encoded(ids, tokens, encode(self.recipe, rows, ids))

    def add_encoded(self, ids: Sequence[str], tokens: Sequence[int], rows: EncodedRows) -> None:
        """Add documents that `encode` was applied to, on another rank for example."""
        if not len(ids) == len(tokens) == len(rows[self.recipe.modules[0].name]["scales"]) or not all(ids):
            raise DataError(
                f"{len(ids)} ids and {len(tokens)} numbers of tokens came for other rows; give one for each"
            )
        self.ids += ids
        self.tokens += [int(count) for count in tokens]
        self.rows.append(rows)


def _begin(folder: Path, recipe: IndexRecipe, append: bool, documents: int) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give an index a folder of its own")
    unknown = sorted(p.name for p in folder.iterdir() if not _FILES.fullmatch(p.name)) if folder.exists() else []
    if unknown:
        raise CheckpointError(f"{folder} holds {unknown[0]}; give an index a folder of its own")
    published, building = in_folder(folder, NAME), in_folder(folder, BUILDING)  # none of a missing folder
    listed: set[str] = set()
    if published is not None:
        found, entries = read_index(published)
        if not append:
            raise CheckpointError(
                f"{folder} has a complete index; add documents to it with append, or give another folder"
            )
        found.check(recipe, str(folder))
        listed = {entry.file for entry in entries}
    elif append:
        raise CheckpointError(f"{folder} has no index to append to; build it without append")
    present = sum(path.stat().st_size for path in folder.glob("shard-*") if path.name not in listed)
    need, space = documents * recipe.bytes_of_row - present, disk.free(folder)
    if need > space:
        raise CheckpointError(
            f"{folder} needs {need / 2**20:,.0f} MiB for {documents:,} documents, and {space / 2**20:,.0f} MiB are "
            "free; free some space, keep less of each document, or write to another place"
        )
    if building is not None:
        read_recipe(building)[0].check(recipe, f"the unfinished index {folder}")
    else:
        unlisted = sorted({path.name for path in folder.glob("shard-*.safetensors")} - listed)
        if unlisted:
            raise CheckpointError(f"{folder / unlisted[0]} belongs to no index that {folder} lists; remove the file")
        folder.mkdir(parents=True, exist_ok=True)
        disk.replace(folder / BUILDING, as_bytes({"format": FORMAT, "recipe": recipe.as_json()}))
