"""The settings of an index: what of a document's gradient is kept, and in how many bits. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError

Kind = Literal["psift", "eigen-topk", "exact"]
Curvature = Literal["kfac", "ekfac", "tkfac", "shampoo", "identity"]
Distribution = Literal["rademacher", "normal"]
Storage = Literal["int8", "int4", "float16", "float32"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("psift", "eigen-topk", "exact"),
    "curvature": ("kfac", "ekfac", "tkfac", "shampoo", "identity"),
    "distribution": ("rademacher", "normal"),
    "storage": ("int8", "int4", "float16", "float32"),
}


@dataclass(frozen=True, kw_only=True)
class SketchSettings:
    """What an index keeps of each document.

    Attributes:
        kind: `eigen-topk`: the largest coordinates of H^(−½) G in the eigenbasis of the curvature, most quality per
            byte. `psift`: random projections of both sides of H^(−½) G, unbiased. `exact`: G itself.
        curvature: H: a Kronecker product (kfac, tkfac, shampoo), the same with corrected eigenvalues (ekfac), or none.
        size: psift: numbers that are kept of each side, p; a side that has no more is not projected.
        entries: eigen-topk: entries that are kept of each document and module, 3 bytes each.
        block: eigen-topk: keep the coordinates of this many leading eigenvectors of each side; None: of all.
        distribution: psift: of the entries of projections.
        storage: of the numbers; for int8 and int4 relative to the largest of a document and module.
        damping: added to the eigenvalues, in units of their mean: of each side for psift, else of their products.
        restore_norm: eigen-topk: scale what is kept of a document and module to the norm of all its coordinates.
        seed: of projections.
    """

    kind: Kind = "eigen-topk"
    curvature: Curvature = "ekfac"
    size: int = 16
    entries: int = 42
    block: int | None = None
    distribution: Distribution = "rademacher"
    storage: Storage = "int8"
    damping: float = 0.1
    restore_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            if (value := getattr(self, field)) not in allowed:
                raise ConfigError(f"{field} is {value!r}; it is one of {', '.join(allowed)}", field=field)
        for field in ("size", "entries", "block"):
            value = getattr(self, field)
            if not (field == "block" and value is None) and (type(value) is not int or value < 1):
                raise ConfigError(f"{field} is {value!r}; it is a number from 1", field=field)
        if type(self.seed) is not int:
            raise ConfigError(f"seed is {self.seed!r}; it is a whole number", field="seed")
        if type(self.restore_norm) is not bool:
            raise ConfigError(f"restore_norm is {self.restore_norm!r}; it is true or false", field="restore_norm")
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 <= self.damping < 1e6:
            raise ConfigError(f"damping is {self.damping!r}; it is a number from 0", field="damping")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.kind == "psift" and self.curvature == "ekfac":
            raise ConfigError(
                "psift cannot use corrected eigenvalues (curvature ekfac): they are no product of two sides, and a "
                "projected gradient cannot be corrected any more; use kind: eigen-topk, which can, or curvature: kfac",
                field="curvature",
            )
        if self.kind == "eigen-topk" and self.curvature == "identity":
            raise ConfigError(
                "eigen-topk selects coordinates of whitened gradients, and curvature identity whitens nothing; "
                "use kind: psift or exact for products of gradients, or a measured curvature",
                field="curvature",
            )
        if self.storage == "int4" and self.kind != "exact":
            raise ConfigError(
                f"{self.kind} keeps so few numbers that 4 bits would lose too much; int4 is for kind: exact",
                field="storage",
            )
        if self.kind == "eigen-topk" and self.storage != "int8":
            raise ConfigError(
                f"eigen-topk stores its values as int8, not as {self.storage}; more entries gain more than more bits",
                field="storage",
            )

    @property
    def two_sided(self) -> bool:
        """Whether documents and queries are whitened alike, so that lengths and angles of rows mean something."""
        return self.kind != "exact" or self.curvature == "identity"
