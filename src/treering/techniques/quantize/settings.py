"""What a user sets of the technique `quantize`, and its checks."""

from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError

FormatName = Literal["stored", "int8", "int4", "int3", "fp8", "fp8_block", "nf4", "mxfp4", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """The fields of `Quantize`, documented there."""

    format: FormatName = "nvfp4"
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    group: int | None = None
    clip: Literal["max", "mse"] = "max"
    weights: Literal["packed", "fake"] = "packed"

    def __post_init__(self) -> None:
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ConfigError(
                f"targets is {self.targets!r}; write all-linear or a list of patterns such as experts", field="targets"
            )
        if self.group is not None and (self.format not in ("int4", "int3") or self.group < 1):
            raise ConfigError(
                f"group is {self.group} with format {self.format}; int4 and int3 take a group of inputs (128 unless set), "
                "the other formats have one of their own",
                field="group",
            )
        if self.format == "stored" and (self.weights == "fake" or self.clip != "max"):
            raise ConfigError(
                "format `stored` keeps the folder's own codes: there is nothing to round again or to clip. Leave out "
                "`weights` and `clip`",
                field="format",
            )
