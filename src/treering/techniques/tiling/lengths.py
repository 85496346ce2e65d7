"""How long a tile is: integers that every rank knows from its own shapes, without asking another or the device."""

from itertools import pairwise
from typing import Literal

from treering.core.errors import ConfigError

Tile = int | Literal["budget", "hidden"]

GIB = 2**30
ALIGNED = 64  # longer tiles begin at multiples of it: kernels are slow on ragged rows
SHORTEST = 256  # shorter ones read the weights more often than they save memory


def check(tile: Tile, budget: float) -> None:
    if isinstance(tile, int) and (tile < 1 or isinstance(tile, bool)):
        raise ConfigError(f"tile is {tile}; it is a number of tokens, at least 1, or budget or hidden", field="tile")
    if not budget > 0:
        raise ConfigError(f"budget is {budget}; it is a number of GiB greater than 0", field="budget")


def tile_length(tile: Tile, budget: float, bytes_per_token: int, hidden: int) -> int:
    """The most tokens that a tile may have.

    budget   what one tile needs at its peak fits into `budget` GiB
    hidden   as many tokens as the model is wide, so that there are ⌈tokens / hidden⌉ tiles: what other systems do
    """
    if tile == "hidden":
        return hidden
    if tile == "budget":
        return max(SHORTEST, int(budget * GIB) // max(1, bytes_per_token))
    return tile


def bounds(total: int, length: int) -> tuple[tuple[int, int], ...]:
    """Where tiles of at most `length` begin and end: as few as can be, and as equal as can be.

    >>> bounds(10, 4)
    ((0, 4), (4, 7), (7, 10))
    """
    if length < 1:
        raise ValueError(f"a tile of {length} tokens")
    unit = ALIGNED if length >= 8 * ALIGNED else 1
    units, most = -(-total // unit), length // unit
    tiles = max(1, -(-units // most))
    each, more = divmod(units, tiles)
    ends = [min(total, unit * (each * i + min(i, more))) for i in range(tiles + 1)]
    return tuple(pairwise(ends))
