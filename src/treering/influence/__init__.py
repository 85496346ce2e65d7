"""Which training documents decided an answer: an index of their gradients, queries, scores, and what to do with them.

index = build(run, documents, "index", statistics=known)
rows = query_rows(Sketched.of(run, index.recipe.settings, known), queries)
best = index.score(rows, top=10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treering.influence.build import build
    from treering.influence.query import query_rows
    from treering.influence.sketched import Sketched

__all__ = ["Sketched", "build", "query_rows"]
_WHERE = {"Sketched": "sketched", "build": "build", "query_rows": "query"}  # looked up late: some parts need no torch


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"treering.influence has no {name!r}")
    globals()[name] = value = getattr(import_module(f"treering.influence.{_WHERE[name]}"), name)
    return value
