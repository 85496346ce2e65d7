"""What a user sets of the three tilings, and their checks."""

from dataclasses import dataclass
from typing import Literal

from treering.objectives import CrossEntropy
from treering.techniques.tiling.lengths import Tile, check

Accumulate = Literal["float32", "parameter", "budget"]


@dataclass(frozen=True, kw_only=True)
class TiledMLPSettings:
    """The fields of `TiledMLP`, which documents them."""

    tile: Tile = "budget"
    budget: float = 1.0
    experts: Literal["tokens", "groups"] = "tokens"
    accumulate: Accumulate = "float32"

    def __post_init__(self) -> None:
        check(self.tile, self.budget)


@dataclass(frozen=True, kw_only=True)
class TiledBlockSettings(TiledMLPSettings):
    """The fields of `TiledBlock`, which documents them: those of `TiledMLP`, which it contains."""


@dataclass(frozen=True, kw_only=True)
class TiledLossSettings:
    """The fields of `TiledLoss`, which documents them."""

    tile: int | Literal["budget"] = "budget"
    budget: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    accumulate: Accumulate = "float32"

    def __post_init__(self) -> None:
        check(self.tile, self.budget)
        CrossEntropy(label_smoothing=self.label_smoothing, z_loss=self.z_loss)  # which checks them
