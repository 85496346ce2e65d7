"""Which training examples moved an answer: an index of their gradients, queries, scores, and what to do with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treering.influence.building import build
    from treering.influence.query import query_rows
    from treering.influence.sketched import Sketched

__all__ = ["Sketched", "build", "query_rows"]

# Names are looked up when they are asked for: tables of scores and cleaning need neither torch nor a model.
_WHERE = {"Sketched": "sketched", "build": "building", "query_rows": "query"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"treering.influence has no {name!r}")
    globals()[name] = value = getattr(import_module(f"treering.influence.{_WHERE[name]}"), name)
    return value
