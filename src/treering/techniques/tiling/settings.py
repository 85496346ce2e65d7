"""The settings of the three tilings, and their checks."""

from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError
from treering.objectives import CrossEntropy

Tile = int | Literal["budget", "hidden"]
Accumulate = Literal["float32", "parameter", "budget"]
BUDGET = 1.0  # GiB


@dataclass(frozen=True, kw_only=True)
class TiledMLPSettings:
    """The fields of `TiledMLP`, which documents them."""

    tile: Tile = "budget"
    budget: float = 1.0
    experts: Literal["tokens", "groups"] = "tokens"
    accumulate: Accumulate = "float32"

    def __post_init__(self) -> None:
        check_tile(self.tile, self.budget)


@dataclass(frozen=True, kw_only=True)
class TiledBlockSettings(TiledMLPSettings):
    """The fields of `TiledBlock`, which documents them: those of `TiledMLP`, which it contains."""


@dataclass(frozen=True, kw_only=True)
class TiledLossSettings:
    """The fields of `TiledLoss`, which documents them."""

    tile: int | Literal["budget"] = "budget"
    budget: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    accumulate: Accumulate = "float32"

    def __post_init__(self) -> None:
        check_tile(self.tile, self.budget)
        CrossEntropy(label_smoothing=self.label_smoothing, z_loss=self.z_loss)  # its constructor checks them


def check_tile(tile: Tile, budget: float | None) -> None:
    """Raise ConfigError unless both are in their range."""
    if isinstance(tile, int) and (tile < 1 or isinstance(tile, bool)):
        raise ConfigError(f"tile is {tile}; it is a number of tokens, at least 1, or budget or hidden", field="tile")
    if budget is not None and not budget > 0:
        raise ConfigError(f"budget is {budget}; it is a number of GiB greater than 0", field="budget")
