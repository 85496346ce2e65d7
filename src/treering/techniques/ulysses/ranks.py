"""This rank's place among those of the axis `sequence`, and the exchange of a row of tokens from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from treering.attention.documents import Documents
from treering.core.row_messages import Transport
from treering.core.topology import grid_of_sequence
from treering.techniques.ulysses.coded import NONE, Codecs
from treering.techniques.ulysses.exchange import Partners, UlyssesExchange
from treering.techniques.ulysses.shares import Grid, Ranges, pieces

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class SequenceRanks:
    """The ranks that share a row of tokens, and this one among them.

    Attributes:
        grid: How they are arranged.
        rank: Of this process among them.
        row, column: Names of the process groups of its row and its column of the grid; empty for one rank alone.
        transport, codecs: How they exchange.
    """

    grid: Grid
    rank: int
    row: str = ""
    column: str = ""
    transport: Transport = "collective"
    codecs: Codecs = NONE

    @classmethod
    def of_group(
        cls, group: Any, transport: Transport = "collective", codecs: Codecs = NONE, *, gathered: bool = False
    ) -> "SequenceRanks":
        """Return the ranks of one process group, which all exchange heads, or which all gather keys."""
        size, rank, name = dist.get_world_size(group), dist.get_rank(group), group.group_name
        grid = Grid(heads=1, gathered=size) if gathered else Grid(heads=size)
        names = {"column" if gathered else "row": name}
        return cls(grid=grid, rank=rank, transport=transport, codecs=codecs, **names)

    @classmethod
    def of_mesh(
        cls, mesh: "DeviceMesh", grid: Grid, transport: Transport = "collective", codecs: Codecs = NONE
    ) -> "SequenceRanks":
        """Return the ranks of the axis `sequence` as a grid. Creates process groups if it has rows and columns."""
        axis = mesh["sequence"]
        if grid.ranks != axis.size():
            raise AssertionError(f"a grid of {grid.ranks} ranks for {axis.size()}")
        if 1 in (grid.heads, grid.gathered):
            return cls.of_group(axis.get_group(), transport, codecs, gathered=grid.heads == 1)
        row, column = grid_of_sequence(mesh, grid.heads)
        return cls(
            grid=grid,
            rank=axis.get_local_rank(),
            row=row.group_name,
            column=column.group_name,
            transport=transport,
            codecs=codecs,
        )

    def tokens(self, tokens: int) -> Ranges:
        """Return the ranges of a row's tokens that this rank has."""
        return self.grid.tokens(tokens)[self.rank]

    def exchange(self, tokens: int, last_position: int = 0) -> UlyssesExchange:
        """Return the exchange for a row of so many tokens."""
        grid = self.grid
        shares, of_rows = grid.tokens(tokens), grid.row_tokens(tokens)
        at, place = grid.place(self.rank)
        how = {"transport": self.transport, "codecs": self.codecs}
        row = column = None
        if grid.heads > 1:
            here = shares[at * grid.heads : (at + 1) * grid.heads]
            row = Partners(group=self.row, place=place, tokens=_numbers(here), **how)  # type: ignore[arg-type]
        if grid.gathered > 1:
            column = Partners(group=self.column, place=at, tokens=_numbers(of_rows), **how)  # type: ignore[arg-type]
        return UlyssesExchange(row=row, column=column, ranges=of_rows, last_position=last_position)

    def documents(self, lengths: Sequence[int], device: torch.device | str, last_position: int = 0) -> Documents:
        """Return what this rank has of each document of a row, with the exchange.

        Args:
            lengths: of the documents of the complete row, padding included.
        """
        tokens = sum(lengths)
        inside = Documents.of(lengths, device)
        if self.grid.gathered > 1:
            inside = inside.with_queries(self.grid.row_tokens(tokens)[self.grid.place(self.rank)[0]])
        own = Documents.of(pieces(lengths, self.tokens(tokens)), device)
        return own.exchanged(self.exchange(tokens, last_position), inside)


def _numbers(shares: Sequence[Ranges]) -> tuple[int, ...]:
    return tuple(sum(map(len, ranges)) for ranges in shares)
