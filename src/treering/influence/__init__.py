"""Which training examples moved an answer: an index of their gradients, queries, scores, and what to do with them."""

from treering.influence.build import build
from treering.influence.query import query_rows
from treering.influence.sketched import Sketched

__all__ = ["Sketched", "build", "query_rows"]
