"""The place of one tensor of a measurement."""

from dataclasses import dataclass

Counts = int | tuple[int, ...]  # of tokens; of stacked experts one for each


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The place of the moment of a weight on disk. Weights that see the same inputs have the same `key`."""

    key: str
    tokens: Counts
    shape: tuple[int, ...]
    digest: str  # of the values
    file: str = ""  # "" in memory
