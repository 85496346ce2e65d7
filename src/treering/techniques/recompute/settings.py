"""The settings of the technique `recompute`, and their checks."""

import re
from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError

Kept = Literal["attention", "all_to_all"]
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True)
class RecomputeSettings:
    """The fields of `Recompute`, which documents them."""

    keep: tuple[Kept, ...] = ()
    offload: Literal["none", "cpu"] = "none"
    first_blocks: int | None = None
    budget: str | None = None
    prefetch: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise ConfigError(f"keep is {self.keep!r}; write a list: [{self.keep}]", field="keep")
        for i, name in enumerate(self.keep):
            if name not in ("attention", "all_to_all"):
                raise ConfigError(f"keep has {name!r}; it may have attention and all_to_all", field=f"keep[{i}]")
        for setting in ("first_blocks", "budget", "prefetch"):
            if self.offload == "none" and getattr(self, setting) is not None:
                raise ConfigError(
                    f"{setting} is about what is offloaded, and offload is none; set offload to cpu, or leave "
                    f"{setting} out",
                    field=setting,
                )
        if self.prefetch is not None and self.prefetch < 1:
            raise ConfigError(f"prefetch is {self.prefetch}; it is a number of blocks, at least 1", field="prefetch")
        if self.first_blocks is not None and self.first_blocks < 1:
            raise ConfigError(
                f"first_blocks is {self.first_blocks}; it is at least 1. To offload nothing, set offload to none",
                field="first_blocks",
            )
        if self.first_blocks is not None and self.budget is not None:
            raise ConfigError("first_blocks and budget both limit how much is offloaded; leave one out", field="budget")
        if self.budget is not None:
            read_bytes(self.budget)


def read_bytes(text: str) -> int:
    """Return the number of bytes that a text such as 64GiB or 512 MiB stands for."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)\s*", text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"budget is {text!r}; write a size in KiB, MiB, GiB or TiB, such as 64GiB", field="budget")
    return int(float(match[1]) * UNITS[match[2]])
