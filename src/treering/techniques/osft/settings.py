"""The settings of the technique `osft`, and their checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from treering.core.errors import ConfigError
from treering.core.settings import BEFORE, BEGUN, FORMERLY

FACTORED = ("forward", "factors")
ADDENDS = ("merged", "one_sided", "core")


@dataclass(frozen=True, kw_only=True)
class OSFTSettings:
    """The fields of `OSFT`, which documents them.

    Identities of prepared results are written with the former names, so that those of earlier versions are found.
    """

    protect: Literal["inputs", "weights", "both"] = "inputs"
    strength: Literal["soft", "hard"] = "soft"
    damping: float = field(default=0.01, metadata={FORMERLY: ("soften",)})
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    rank: Literal["ratio", "energy", "importance"] = "ratio"
    energy: float = 0.9
    importance: tuple[float, float] = (0.1, 0.8)
    form: Literal["auto", "merged", "update", "one_sided", "core", "forward", "factors"] = field(
        default="auto", metadata={BEGUN: True}
    )
    communication: Literal["coefficients", "gather", "cached"] = field(
        default="coefficients", metadata={FORMERLY: ("wire",)}
    )
    compute: Literal["auto", "factored", "dense", "rebuilt"] = "auto"
    keep_initial: bool = field(default=False, metadata={FORMERLY: ("anchor",)})
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    train: tuple[str, ...] = ()
    free: Mapping[str, int] = field(default_factory=dict)
    unmeasured: Literal["refuse", "freeze", "unprotected"] = "refuse"
    # The last one, so that texts of earlier versions, which did not have it, are completed at the end.
    precision: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={BEFORE: "float32", BEGUN: True})

    def __post_init__(self) -> None:
        for name, value in {"ratio": self.ratio, **{f"ratios.{k}": v for k, v in self.ratios.items()}}.items():
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; it lies between 0 (frozen) and 1 (all trainable)", field=name)
        if not 0 < self.damping < inf:
            raise ConfigError(f"damping is {self.damping}; it must be a number greater than 0", field="damping")
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy is {self.energy}; it lies above 0 and at most at 1", field="energy")
        least, most = self.importance
        if not 0 <= least <= most <= 1:
            raise ConfigError(f"importance is {least}, {most}; write 0 ≤ least ≤ most ≤ 1", field="importance")
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ConfigError(f"targets is {self.targets!r}; write all-linear or a list of patterns", field="targets")
        if self.form in FACTORED and self.protect != "weights":
            raise ConfigError(
                f"form {self.form} stores W as its singular factors, so it can protect: weights only; "
                f"for protect: {self.protect} use form update or one_sided",
                field="form",
            )
        if self.form == "core" and self.protect == "inputs":
            raise ConfigError(
                "form core trains between trainable directions on both sides, and protect: inputs has one; "
                "use form one_sided, or protect: weights or both",
                field="form",
            )
        if self.form == "merged" and self.protect != "inputs":
            raise ConfigError(
                f"form merged trains between all outputs and the trainable directions of inputs, which protect: "
                f"{self.protect} does not have; use form update or one_sided",
                field="form",
            )
        if self.keep_initial and self.chosen_form != "update":
            raise ConfigError(
                f"keep_initial is for form update; form {self.form} has its change without it", field="keep_initial"
            )

    @property
    def chosen_form(self) -> Literal["merged", "update", "one_sided", "core", "forward", "factors"]:
        """The form, after `auto` has been decided."""
        if self.form != "auto":
            return self.form
        of_update = self.keep_initial or self.communication == "cached"  # settings that are of form update
        return "merged" if self.protect == "inputs" and not of_update else "update"

    @property
    def measured(self) -> bool:
        """Whether statistics of inputs are needed."""
        return self.protect != "weights" or self.rank == "importance"
