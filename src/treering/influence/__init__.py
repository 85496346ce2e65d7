"""Which training documents decided an answer: an index of their gradients, queries, scores, and what to do with them.

index = build(run, documents, "index", statistics=known)
rows = query_rows(Sketched.of(run, index.recipe.settings, known), queries)
best = index.score(rows, top=10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treering.influence.building import build
    from treering.influence.query import query_rows
    from treering.influence.sketched import Sketched

__all__ = ["Sketched", "build", "query_rows"]

# Looked up when they are asked for: tables of scores need no torch. No name may be that of a file: importing the file
# would put the module in the place of the function.
_WHERE = {"Sketched": "sketched", "build": "building", "query_rows": "query"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"treering.influence has no {name!r}")
    globals()[name] = value = getattr(import_module(f"treering.influence.{_WHERE[name]}"), name)
    return value
