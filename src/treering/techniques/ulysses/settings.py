"""The settings of the technique `ulysses`."""

from dataclasses import dataclass
from typing import Literal

Layout = Literal["auto", "heads", "gathered", "2d"]


@dataclass(frozen=True, kw_only=True)
class UlyssesSettings:
    """The fields of `Ulysses`, which documents them."""

    transport: Literal["collective", "paired"] = "collective"
    layout: Layout = "auto"
