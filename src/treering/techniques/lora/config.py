"""The technique `lora`: low-rank adapters next to linear layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from treering.core.errors import PlanError
from treering.technique import Applied, Claim, Need, Site, Stage
from treering.techniques.lora.settings import RESIDUAL, LoRASettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(LoRASettings):
    """Add low-rank adapters to linear layers, and to each expert of stacked experts.

    y = W x + (alpha / rank) B A x, with A and B trained and W frozen.

    targets   `all-linear`: every linear and all experts inside the blocks, no routers; or patterns of names
    alpha     numerator of the scale; null: equal to `rank`, so that the scale is 1
    rslora    scale alpha / √rank, which keeps the size of updates when the rank grows
    dtype     of A, B and their arithmetic, whatever the base is stored or computed in; `base`: that of the weight.
              fp32, bf16 and fp16 are short for float32, bfloat16 and float16
    init      kaiming_zeros: A random, B zero, so that training starts at the base model
              residual: A and B are the best approximation of W − Q(W), what `quantize` left out
              activation: the same, with the least error for measured inputs (`treering measure`)
              pissa: A and B take the largest singular directions of W and W keeps the rest
              file: A and B from the peft folder `file`
    patterns  pattern -> rank, alpha, dtype, init of the targets that it names; later patterns override earlier ones
    allocate  uniform: every matrix has the same rank
              greedy: matrices and experts where it brings back more of what `quantize` left out have a larger one, with
              the same number of parameters in total
    ranks     weight -> rank of each of its matrices: what `allocate` decided, written by `resolve`
    original  folder of the unquantized model, for the residual of weights that the model's folder stores quantized

    Example:
        run = tr.compose("MODEL", [tr.LoRA(rank=16, targets=("q_proj", "v_proj"))])
        run = tr.compose("MODEL", [tr.LoRA(rank=16, patterns={"*.experts.*": {"rank": 4}})])
    """

    stage: ClassVar[Stage] = Stage.ADAPT

    @classmethod
    def from_peft(cls, folder: str | Path, *, name: str = "default") -> "LoRA":
        """Return the settings of an adapter folder, written by peft or by export, with its tensors as the start.

        Example:
            run = tr.compose(model, [tr.LoRA.from_peft("adapter")])
        """
        from treering.techniques.lora.peft_format import read_config

        return cls(name=name, init="file", file=str(folder), **read_config(Path(folder)))

    def resolve(self, anatomy: "Anatomy", source: Any, statistics: Any) -> "LoRA":
        """Return these settings with the ranks that `allocate` chooses, once weights can be read."""
        if self.allocate == "uniform" or self.ranks or source is None:
            return self
        from treering.techniques.lora.allocate import allocated

        return allocated(self, anatomy, source, statistics)

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        claims = []
        for matrix in self.matrices(anatomy):
            chosen = self.of(matrix)
            if chosen.rank > matrix.rank:
                raise PlanError(
                    f"lora: rank {chosen.rank} exceeds what {matrix.module} ({matrix.outputs} × {matrix.inputs}) can "
                    f"have; set its rank to at most {matrix.rank} (lora.rank or lora.patterns) or leave it out of "
                    "lora.targets"
                )
            alone = chosen.init in ("pissa", *RESIDUAL)
            needs: tuple[Need, ...] = ("plain_weight", "own_value") if chosen.init == "pissa" else ()
            # The addend is shared: several adapters add up; but a start that moves the base must be alone on it.
            # The gradient is claimed as well, so that a technique which trains the weight itself is refused next to
            # an adapter instead of training the same thing twice.
            claims.append(
                Claim(fqn=matrix.weight, aspect="addend", exclusive=alone, needs=needs, setting="lora.targets")
            )
            claims.append(Claim(fqn=matrix.weight, aspect="gradient", exclusive=False, setting="lora.targets"))
            claims.append(Claim(fqn=f"{matrix.module}.{self.child(matrix)}", aspect="forward", setting="lora.name"))
        if not claims:
            raise PlanError(f"lora: no linear of this {anatomy.model_type} model is a target; see lora.targets")
        return claims

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.lora.install import install

        return install(model, self, site)
