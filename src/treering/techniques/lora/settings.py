"""The settings of the technique `lora`, and their checks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from treering.core.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.anatomy.matrices import Matrix

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


Dtype = Literal["float32", "bfloat16", "float16", "float64", "base", "fp32", "bf16", "fp16"]
Start = Literal["kaiming_zeros", "residual", "activation", "pissa"]
RESIDUAL = ("residual", "activation")


@dataclass(frozen=True, kw_only=True)
class LoRAPattern:
    """What the weights that one pattern of `lora.patterns` names have of their own. null: what `lora` has."""

    rank: int | None = None  # 0: these weights get no adapter
    alpha: float | None = None  # numerator of the scale
    dtype: Dtype | None = None  # of A, B and their arithmetic
    init: Start | None = None  # the start

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", SHORT.get(str(self.dtype), self.dtype))
        if self.rank is not None and self.rank < 0:
            raise ConfigError(f"rank is {self.rank}; it must be at least 0 (0: no adapter)", field="rank")
        _check_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What holds for the adapter of one weight.

    Attributes:
        rank: the number of rows of A and columns of B; of a stack with unequal ranks, the largest.
        ranks: of each matrix of the weight. The rows of A and columns of B from a matrix's rank on are zeros; their
            gradients are zeros as well, so they stay zeros.
        scale: s of y = W x + s · B A x.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    scale: float
    dtype: str
    init: str
    file: str | None
    original: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """The fields of `LoRA`, which documents them."""

    name: str = "default"
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dtype: Dtype = "float32"
    init: Literal["kaiming_zeros", "residual", "activation", "pissa", "file"] = "kaiming_zeros"
    file: str | None = None
    patterns: Mapping[str, LoRAPattern] = field(default_factory=dict)
    allocate: Literal["uniform", "greedy"] = "uniform"
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    original: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", SHORT.get(self.dtype, self.dtype))
        object.__setattr__(self, "patterns", {key: _pattern(key, value) for key, value in self.patterns.items()})
        if not self.name.isidentifier():
            raise ConfigError(
                f"name is {self.name!r}; use letters, digits and _ (it becomes a module name)", field="name"
            )
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1", field="rank")
        _check_alpha(self.alpha)
        if self.targets != "all-linear" and not self.targets:
            raise ConfigError("targets is empty; write all-linear or patterns such as q_proj", field="targets")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ConfigError(f"targets is {self.targets!r}; write all-linear or a list of patterns", field="targets")
        if (self.init == "file") != (self.file is not None):
            raise ConfigError("`file` is given exactly when init is `file`", field="file")
        if self.file is not None and any(pattern.init for pattern in self.patterns.values()):
            raise ConfigError("init is `file`, so no pattern can have another init", field="patterns")
        if self.allocate == "greedy" and self.init not in RESIDUAL:
            raise ConfigError(
                f"allocate is greedy, which chooses ranks for what quantizing leaves out, and init is {self.init}; set "
                "init to activation or residual, or allocate to uniform",
                field="allocate",
            )

        if self.original is not None and self.init not in ("residual", "activation"):
            raise ConfigError(
                f"original is given and init is {self.init}; it is for init: residual and activation", field="original"
            )

        if self.original is not None and self.allocate == "greedy":
            raise ConfigError(
                "allocate is greedy and original is given: ranks are chosen for what is quantized here, and what a "
                "folder stores quantized is not. Set allocate to uniform",
                field="allocate",
            )

    def __repr__(self) -> str:
        """Return the settings as text. A checkpoint stores it and a resumed run must have the same text, so what came
        later is left out where it has no effect."""
        later: dict[str, Any] = {"patterns": {}, "allocate": "uniform", "ranks": {}, "original": None}
        names = [f.name for f in fields(self) if getattr(self, f.name) != later.get(f.name, self)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def of(self, matrix: "Matrix") -> AdapterSettings:
        """Return what holds for the adapter of one weight: a later pattern overrides an earlier one."""
        from treering.anatomy import matches

        chosen: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "dtype": self.dtype, "init": self.init}
        for key, pattern in self.patterns.items():
            if matches(matrix.weight, key) or matches(matrix.module, key):
                chosen |= {name: value for name, value in asdict(pattern).items() if value is not None}
        rank, alpha = chosen["rank"], chosen["rank"] if chosen["alpha"] is None else chosen["alpha"]
        ranks = self.ranks.get(matrix.weight, (rank,) * (matrix.experts or 1))
        return AdapterSettings(
            name=self.name,
            rank=max(ranks),
            ranks=ranks,
            scale=alpha / rank**0.5 if self.rslora else alpha / rank if rank else 0.0,
            dtype=chosen["dtype"],
            init=chosen["init"],
            file=self.file,
            original=self.original,
        )

    def child(self, matrix: "Matrix") -> str:
        """Return the name of the adapter's module inside the module that holds the weight."""
        return f"lora_{self.name}_{matrix.leaf}" if matrix.lead else f"lora_{self.name}"

    def matrices(self, anatomy: "Anatomy") -> "tuple[Matrix, ...]":
        """Return the weights that get an adapter, stacks of experts included, in the model's order."""
        from treering.anatomy import matches, select_matrices
        from treering.anatomy.matrices import all_linear

        chosen = all_linear(anatomy) if self.targets == "all-linear" else select_matrices(anatomy, self.targets)
        for key in self.patterns:
            if not any(matches(m.weight, key) or matches(m.module, key) for m in chosen):
                raise PlanError(
                    f"lora: the pattern {key!r} of lora.patterns matches no target; {chosen[0].weight} is one",
                    settings=("techniques.lora.patterns",),
                )
        chosen = tuple(matrix for matrix in chosen if self.of(matrix).rank)
        for matrix in chosen:
            if matrix.role == "head" and anatomy.head is not None and anatomy.head.tied_to is not None:
                raise PlanError(
                    f"lora: {matrix.module} is tied to {anatomy.head.tied_to}; an adapter on it would change the "
                    "embedding as well on export. Leave the head out of lora.targets"
                )
        return chosen


def _pattern(key: str, value: Any) -> LoRAPattern:
    """Return a pattern that is given as one, or as the mapping of its fields."""
    if isinstance(value, LoRAPattern):
        return value
    known = [f.name for f in fields(LoRAPattern)]
    if not isinstance(value, Mapping) or (unknown := [name for name in value if name not in known]):
        wrong = value if not isinstance(value, Mapping) else unknown[0]
        raise ConfigError(f"patterns: {key!r} has {wrong!r}; a pattern has {', '.join(known)}", field="patterns")
    return LoRAPattern(**value)


def _check_alpha(alpha: float | None) -> None:
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"alpha is {alpha}; it must be greater than 0", field="alpha")
