"""The settings of the technique `ulysses`, and their checks."""

from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError

Layout = Literal["auto", "heads", "gathered", "2d"]
Codec = Literal["none", "int8", "e4m3"]
Uncoded = Literal["query", "key", "value", "output", "gradients"]
UNCODED: tuple[Uncoded, ...] = ("query", "key", "value", "output", "gradients")


@dataclass(frozen=True, kw_only=True)
class UlyssesSettings:
    """The fields of `Ulysses`, which documents them."""

    transport: Literal["collective", "paired"] = "collective"
    layout: Layout = "auto"
    codec: Codec = "none"
    uncoded: tuple[Uncoded, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.uncoded, str):
            raise ConfigError(f"uncoded is {self.uncoded!r}; write a list: [{self.uncoded}]", field="uncoded")
        for i, name in enumerate(self.uncoded):
            if name not in UNCODED:
                raise ConfigError(f"uncoded has {name!r}; it may have {', '.join(UNCODED)}", field=f"uncoded[{i}]")
        if self.uncoded and self.codec == "none":
            raise ConfigError(
                "uncoded names what is sent without a codec, and codec is none; set codec to int8 or e4m3, or leave "
                "uncoded out",
                field="uncoded",
            )
