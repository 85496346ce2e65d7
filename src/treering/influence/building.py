"""Building an index: one backward of every document, whose row is written to a shard.

Documents are packed into batches, and consecutive batches into shards, in an order that depends on the data alone.
Each shard is written by one rank, so the files are the same whoever writes which; a build that was killed keeps the
shards that are complete.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from treering.core.collectives import from_first, gather_objects, is_first, together
from treering.core.errors import DataError, TreeringError
from treering.core.owners import assign
from treering.core.topology import data_rank, sequence_place
from treering.curvature import Statistics
from treering.curvature.vocabulary import Cover
from treering.data.document import Document
from treering.data.loader import cost
from treering.data.order import Order
from treering.influence.sketched import Sketched, packing_of
from treering.plan import Run
from treering.sketches import Index, IndexRecipe, SketchSettings, encode_rows, shard_documents, writing
from treering.sketches import open as open_index
from treering.sketches.gradient_rows import Finish
from treering.sketches.listing import NAME
from treering.sketches.shards import EncodedRows
from treering.store.untrusted import in_folder

# An index has about so many shards, or more: ranks share them out, and a killed build keeps the complete ones. Those of
# a small one have at least so many batches: each shard is flushed to the disk.
SHARDS, BATCHES = 64, 2
Progress = Callable[[int, int], None]
Timed = Callable[[str], AbstractContextManager[object]]


def build(
    run: Run,
    documents: Sequence[Document],
    to: str | Path,
    *,
    settings: SketchSettings | None = None,
    statistics: Statistics | None = None,
    capacity: int = 2048,
    cover: Cover = "blocks",
    about: Mapping[str, str] | None = None,
    progress: Progress = lambda done, of: None,
    timed: Timed = nullcontext,
) -> Index:
    """Build an index of `documents`, or resume a build that was killed; one that is complete is returned as it is.

    Every rank calls it with the same documents.

    Args:
        run: the model, with what trains; `frozen=True` looks at all plain weights.
        documents: tokens, and which of them have a loss.
        to: a folder of the index alone.
        settings: of the rows; default: `eigen-topk` with corrected eigenvalues.
        statistics: from `measure(run, …, gradients=…)`.
        capacity: tokens of a batch, at least those of the longest document.
        cover: matrices inside the `blocks`, or `all`: biases, norms, routers, embedding and head as well. The
            statistics are of the same.
        about: what else queries have to agree with the index in, as texts by name: a digest of the documents.
        progress: called with (batches done, batches of this rank).
        timed: opened around each step, with its name.

    Example:
        known = tr.measure(run, batches, gradients=GradientSettings(kind="ekfac"), to="statistics")
        index = build(run, documents, "index", statistics=known)
    """
    with timed("maps of the modules"):
        sketched = Sketched.of(run, settings or SketchSettings(), statistics, about, cover)
    shards = shards_of(documents, sketched.recipe, capacity, packing_of(run))
    ids = [[documents[i].sample_id for one in bins for i in one] for bins in shards]
    if _is_complete(Path(to), sketched.recipe, ids):
        return open_index(to)
    with writing(to, sketched.recipe) as writer:
        left = [number for number in range(len(shards)) if not writer.is_complete(number, ids[number])]
        left = json.loads(from_first(json.dumps(left)))
        _write(sketched, writer, documents, shards, left, progress, timed)
        with timed("listing the shards"):
            writer.publish(len(shards))
    return open_index(to)


def _is_complete(folder: Path, recipe: IndexRecipe, ids: Sequence[Sequence[str]]) -> bool:
    """Return whether the folder has the index of these documents already. A collective: rank 0 looks."""

    def on_disk() -> bool:
        if not is_first() or not folder.is_dir() or in_folder(folder, NAME) is None:
            return False
        index = open_index(folder)
        return index.recipe.digest == recipe.digest and list(index.all_ids()) == [name for one in ids for name in one]

    return bool(together(on_disk, f"opening {folder}")[0])


def lengths_of(documents: Sequence[Document]) -> NDArray[np.int32]:
    """Return the number of tokens of each document."""
    known = getattr(documents, "lengths", None)
    return np.asarray([len(one.ids) for one in documents] if known is None else known, dtype=np.int32)


def shards_of(
    documents: Sequence[Document], recipe: IndexRecipe, capacity: int, packing: Literal["on", "off"]
) -> list[list[list[int]]]:
    """Return the batches of each shard, as numbers of documents: a function of the documents and the recipe."""
    lengths = lengths_of(documents)
    if not len(lengths):
        raise DataError("there is no document to index")
    order = Order(lengths, seed=0, tokens_per_step=capacity, capacity=capacity, shuffle=False, packing=packing)
    bins = [one for step in range(order.steps_in_epoch(0)) for one in order.bins(0, step)]
    most, share = shard_documents(recipe), -(-len(documents) // SHARDS)
    shards: list[list[list[int]]] = [[]]
    for one in bins:
        after = sum(map(len, shards[-1])) + len(one)
        if shards[-1] and after > (share if len(shards[-1]) >= BATCHES and share < most else most):
            shards.append([])
        shards[-1].append(one)
    return shards


def _write(
    sketched: Sketched, writer: Any, documents: Sequence[Document], shards: Sequence[list[list[int]]],
    left: Sequence[int], progress: Progress, timed: Timed,
) -> None:  # fmt: skip
    """Write this rank's share of the shards that are left. A collective: all ranks run equally many batches."""
    rank, ranks = data_rank(sketched.run.plan.mesh)
    lengths = lengths_of(documents)
    costs = {n: sum(cost(one, lengths) for one in shards[n]) for n in left}
    owners = assign(costs, ranks) if left else {}
    own = sorted(n for n, owner in owners.items() if owner == rank)
    batches = [sum(len(shards[n]) for n, owner in owners.items() if owner == r) for r in range(ranks)]
    writes = not any(sequence_place(sketched.run.plan.mesh))  # of ranks that share rows, one writes
    done = 0
    problem: TreeringError | None = None
    with sketched.rows() as rows_of:
        try:
            for number in own:
                with writer.shard(number) if writes else nullcontext() as shard:
                    for one in shards[number]:
                        chosen = [documents[i] for i in one]
                        ids = [document.sample_id for document in chosen]
                        done += 1
                        with timed("forward, backward and rows"):
                            found: EncodedRows = rows_of(chosen, encoder_of(sketched.recipe, ids))
                        if shard is not None:
                            shard.add_encoded(ids, [len(document.ids) for document in chosen], found)
                        progress(done, batches[rank])
        except TreeringError as error:
            problem = error
        for _ in range(max(batches, default=0) - done):  # other ranks wait for this one in gathers and sums
            rows_of([], lambda module, x: None)
    if others := [one for one in gather_objects(problem) if one is not None]:
        raise problem or others[0]


def encoder_of(recipe: IndexRecipe, ids: Sequence[str]) -> Finish:
    """Return what stores the rows of the documents `ids` of a module."""
    modules = {module.name: module for module in recipe.modules}
    return lambda name, x: encode_rows(recipe, modules[name], x, ids)
