"""What a user sets of the technique `quantize`, and its checks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from treering.core.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.anatomy.matrices import Matrix
    from treering.formats import Format

FormatName = Literal["int8", "int4", "int3", "fp8", "fp8_block", "nf4", "mxfp4", "nvfp4", "stored"]


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """The fields of `Quantize`, documented there."""

    format: FormatName = "nvfp4"
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    group: int | None = None
    clip: Literal["max", "mse"] = "max"
    global_scale: Literal["matrix", "merged"] = "matrix"
    storage: Literal["packed", "fake"] = "packed"
    cast: Literal["stored", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        unset = (self.targets, self.group, self.clip, self.global_scale) == ("all-linear", None, "max", "matrix")
        if self.format == "stored" and not (unset and self.storage == "packed"):
            raise ConfigError(
                "format is stored, which keeps every weight that the folder holds quantized, as it is; leave targets, "
                "group, clip, global_scale and storage out",
                field="format",
            )
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ConfigError(
                f"targets is {self.targets!r}; write all-linear or a list of patterns such as q_proj", field="targets"
            )
        if self.group is not None and (self.format not in ("int4", "int3") or self.group < 1):
            raise ConfigError(
                f"group is {self.group} with format {self.format}; int4 and int3 take a group of inputs (128 unless "
                "set), the other formats have one of their own",
                field="group",
            )

        if self.global_scale == "merged" and self.format != "nvfp4":
            raise ConfigError(
                f"global_scale is merged with format {self.format}; nvfp4 alone has a global scale, leave it out",
                field="global_scale",
            )

        if self.global_scale == "merged" and self.storage == "fake":
            raise ConfigError(
                "global_scale is merged and storage is fake: the weights train one by one, and each has its own scale; "
                "leave global_scale out",
                field="global_scale",
            )
        if self.cast != "stored" and self.storage == "packed":
            raise ConfigError(f"cast is {self.cast}, which is for storage: fake; leave it out", field="cast")

    def matrices(self, anatomy: "Anatomy") -> "tuple[Matrix, ...]":
        """Return the matrices that are quantized."""
        from treering.anatomy import matches
        from treering.anatomy.matrices import all_linear, matrices

        if self.targets == "all-linear":
            return all_linear(anatomy)
        each = matrices(anatomy)
        for pattern in self.targets:
            if not any(matches(m.weight, pattern) for m in each):
                raise PlanError(f"quantize: the pattern {pattern!r} of targets matches no linear and no experts")
        return tuple(m for m in each if any(matches(m.weight, p) for p in self.targets))

    def form(self, matrix: "Matrix", scale_dtype: str) -> "Format":
        """Return the number format of one matrix."""
        from treering import formats

        settings: dict[str, int | str] = {"group": self.group} if self.group is not None else {}
        if self.format in ("int8", "int4", "int3", "fp8"):
            settings["scale_dtype"] = scale_dtype
        form = formats.named(self.format, **settings)
        if reason := form.refusal(matrix.outputs, matrix.inputs):
            raise PlanError(
                f"quantize: {matrix.weight}: {reason}. Leave it out of quantize.targets, or use another format: int8 "
                "and fp8 take any shape",
                settings=("quantize.format",),
            )
        return form
