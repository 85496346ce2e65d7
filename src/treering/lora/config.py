"""The technique `lora`: low-rank adapters beside dense linears."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from treering.errors import ConfigError, PlanError
from treering.technique import Applied, Claim, Need, Site, Stage

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy, Linear


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """W x + (alpha / rank) B A x, with A and B trained and W frozen.

    targets   `all-linear`: every linear inside the blocks but routers; or patterns of module names
    alpha     numerator of the scale; null: equal to `rank`, so that the scale is 1
    rslora    scale alpha / √rank, which keeps the size of updates when the rank grows
    dtype     of A, B and their arithmetic, whatever the base is stored or computed in; `base`: that of the weight
    init      kaiming_zeros: A random, B zero, so that training starts at the base model
              pissa: A and B take the largest singular directions of W and W keeps the rest
              file: A and B from the peft folder `file`
    """

    name: str = "default"
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float64", "base"] = "float32"
    init: Literal["kaiming_zeros", "pissa", "file"] = "kaiming_zeros"
    file: str | None = None

    stage: ClassVar[Stage] = Stage.ADAPT

    def __post_init__(self) -> None:
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

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank

    @classmethod
    def from_peft(cls, folder: str | Path, *, name: str = "default") -> "LoRA":
        """The settings, and the tensors as a start, of an adapter folder written by peft or by us."""
        from treering.lora.peft_format import read_config

        return cls(name=name, init="file", file=str(folder), **read_config(Path(folder)))

    def linears(self, anatomy: "Anatomy") -> "tuple[Linear, ...]":
        from treering.anatomy import select

        if self.targets == "all-linear":
            inside = (x for x in anatomy.linears if x.block is not None)
            return tuple(x for x in inside if x.role in ("attention", "mlp"))
        chosen = select(anatomy, self.targets)
        for linear in chosen:
            if linear.role == "head" and anatomy.head is not None and anatomy.head.tied_to is not None:
                raise PlanError(
                    f"lora: {linear.fqn} is tied to {anatomy.head.tied_to}; an adapter on it would change the "
                    "embedding as well on export. Leave the head out of lora.targets"
                )
        return chosen

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        claims = []
        for linear in self.linears(anatomy):
            if self.rank > min(linear.inputs, linear.outputs):
                raise PlanError(
                    f"lora: rank {self.rank} exceeds what {linear.fqn} ({linear.outputs} × {linear.inputs}) can have; "
                    f"set lora.rank to at most {min(linear.inputs, linear.outputs)} or leave it out of lora.targets"
                )
            pissa = self.init == "pissa"
            needs: tuple[Need, ...] = ("plain_weight",) if pissa else ()
            # The addend is shared: several adapters add up; but a start that moves the base must be alone on it.
            # The gradient is claimed as well, so that a technique which trains the weight itself is refused beside
            # an adapter instead of training the same thing twice.
            claims.append(
                Claim(fqn=linear.weight, aspect="addend", exclusive=pissa, needs=needs, setting="lora.targets")
            )
            claims.append(Claim(fqn=linear.weight, aspect="gradient", exclusive=False, setting="lora.targets"))
            claims.append(Claim(fqn=f"{linear.fqn}.lora_{self.name}", aspect="forward", setting="lora.name"))
        if not claims:
            raise PlanError(f"lora: no linear of this {anatomy.model_type} model is a target; see lora.targets")
        return claims

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.lora.addend import attach

        return attach(model, self, site)
