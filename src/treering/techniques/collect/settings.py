"""The settings of the technique `collect`, and their checks."""

from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError
from treering.sketches.settings import Curvature, Kind, SketchSettings


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """The fields of `Collect`, which documents them."""

    to: str = "influence"
    kind: Kind = "psift"
    curvature: Curvature = "kfac"
    size: int = 16
    entries: int = 42
    damping: float = 0.1
    seed: int = 0
    cover: Literal["blocks", "all"] = "blocks"

    def __post_init__(self) -> None:
        if not self.to.strip():
            raise ConfigError("to is empty; name a folder for the index", field="to")
        if self.cover not in ("blocks", "all"):
            raise ConfigError(f"cover is {self.cover!r}; it is blocks or all", field="cover")
        self.sketch()  # its constructor checks the others

    def sketch(self) -> SketchSettings:
        """Return the settings of the index."""
        return SketchSettings(
            kind=self.kind,
            curvature=self.curvature,
            size=self.size,
            entries=self.entries,
            damping=self.damping,
            seed=self.seed,
        )
