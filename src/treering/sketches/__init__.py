"""Rows of an index from the gradients of documents, the index on disk, and scores against queries.

A document's gradient of one matrix is G = Σ_t g_t a_tᵀ: a, the inputs of the matrix, and g, the gradient of its
outputs, are all that is needed of a model, and whoever runs one gives them.

    maps = {m.name: module_map(settings, m.name, N, M, input_basis=…, gradient_basis=…) for m in matrices}
    recipe = recipe_of(maps.values(), settings, model=…, statistics=…, basis=…)

    sums = RowSums(maps, documents=2)                      rows of a group of documents, from any number of pieces
    sums.add(module, a_TM, g_TN, TokenSpans.of_lengths([40, 12]))

    with writing("index", recipe) as writer:               each shard by one rank, in any order; resumes
        with writer.shard(0) as shard:
            shard.add(["chats.jsonl:1#0", "chats.jsonl:2#0"], [40, 12], sums.documents_rows())
        writer.publish(1)

    index = open("index")
    index.check(recipe_of_the_query)                       before the query's gradient is computed
    best = index.score(query_sums.query_rows(), top=10)    best.values, best.documents [Q, 10]
    index.ids(best.documents[0])
    index.dense(0, 1000)                                   float32, for libraries that search nearest neighbours

Every row, and every byte of a shard, is a function of the documents, the recipe and the seed alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treering.sketches.encoding import encode, encode_rows
    from treering.sketches.index import Index, IndexScores
    from treering.sketches.index import open_index as open
    from treering.sketches.maps import ModuleMap, SideBasis, module_map
    from treering.sketches.recipe import IndexModule, IndexRecipe, recipe_of
    from treering.sketches.rows import RowSums, TokenSpans
    from treering.sketches.settings import SketchSettings
    from treering.sketches.writer import IndexWriter, shard_documents, writing

__all__ = [
    "Index",
    "IndexModule",
    "IndexRecipe",
    "IndexScores",
    "IndexWriter",
    "ModuleMap",
    "RowSums",
    "SideBasis",
    "SketchSettings",
    "TokenSpans",
    "encode",
    "encode_rows",
    "module_map",
    "open",
    "recipe_of",
    "shard_documents",
    "writing",
]

# Names are looked up when they are asked for: settings, which a configuration reads, must not import torch.
_WHERE = {
    "encode": ("encoding", "encode"),
    "encode_rows": ("encoding", "encode_rows"),
    "Index": ("index", "Index"),
    "IndexScores": ("index", "IndexScores"),
    "open": ("index", "open_index"),
    "ModuleMap": ("maps", "ModuleMap"),
    "SideBasis": ("maps", "SideBasis"),
    "module_map": ("maps", "module_map"),
    "IndexModule": ("recipe", "IndexModule"),
    "IndexRecipe": ("recipe", "IndexRecipe"),
    "recipe_of": ("recipe", "recipe_of"),
    "RowSums": ("rows", "RowSums"),
    "TokenSpans": ("rows", "TokenSpans"),
    "SketchSettings": ("settings", "SketchSettings"),
    "IndexWriter": ("writer", "IndexWriter"),
    "shard_documents": ("writer", "shard_documents"),
    "writing": ("writer", "writing"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"treering.sketches has no {name!r}")
    module, attribute = _WHERE[name]
    globals()[name] = value = getattr(import_module(f"treering.sketches.{module}"), attribute)
    return value
