"""The settings of the technique `lora`, and their checks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from treering.core.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.anatomy.matrices import Matrix

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """The fields of `LoRA`, which documents them."""

    name: str = "default"
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "float64", "base", "fp32", "bf16", "fp16"] = "float32"
    init: Literal["kaiming_zeros", "residual", "activation", "pissa", "file"] = "kaiming_zeros"
    file: str | None = None
    original: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", SHORT.get(self.dtype, self.dtype))
        if not self.name.isidentifier():
            raise ConfigError(
                f"name is {self.name!r}; use letters, digits and _ (it becomes a module name)", field="name"
            )
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1", field="rank")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha is {self.alpha}; it must be greater than 0", field="alpha")
        if self.targets != "all-linear" and not self.targets:
            raise ConfigError("targets is empty; write all-linear or patterns such as q_proj", field="targets")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ConfigError(f"targets is {self.targets!r}; write all-linear or a list of patterns", field="targets")
        if (self.init == "file") != (self.file is not None):
            raise ConfigError("`file` is given exactly when init is `file`", field="file")

        if self.original is not None and self.init not in ("residual", "activation"):
            raise ConfigError(
                f"original is given and init is {self.init}; it is for init: residual and activation", field="original"
            )

    @property
    def scale(self) -> float:
        """s of y = W x + s · B A x."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank

    def child(self, matrix: "Matrix") -> str:
        """Return the name of the adapter's module inside the module that holds the weight."""
        return f"lora_{self.name}_{matrix.leaf}" if matrix.lead else f"lora_{self.name}"

    def matrices(self, anatomy: "Anatomy") -> "tuple[Matrix, ...]":
        """Return the weights that get an adapter, stacks of experts included, in the model's order."""
        from treering.anatomy import select_matrices
        from treering.anatomy.matrices import all_linear

        if self.targets == "all-linear":
            return all_linear(anatomy)
        chosen = select_matrices(anatomy, self.targets)
        for matrix in chosen:
            if matrix.role == "head" and anatomy.head is not None and anatomy.head.tied_to is not None:
                raise PlanError(
                    f"lora: {matrix.module} is tied to {anatomy.head.tied_to}; an adapter on it would change the "
                    "embedding as well on export. Leave the head out of lora.targets"
                )
        return chosen
