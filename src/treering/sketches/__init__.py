"""Rows of an index from the gradients of documents: projections, maps of a module's two sides, sums over tokens."""

from treering.sketches.maps import ModuleMap, SideBasis, module_map
from treering.sketches.rows import RowSums, TokenSpans
from treering.sketches.settings import SketchSettings

__all__ = ["ModuleMap", "RowSums", "SideBasis", "SketchSettings", "TokenSpans", "module_map"]
