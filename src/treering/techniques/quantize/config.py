"""The technique `quantize`: weights stored as codes of a number format, and decoded where they multiply."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from treering.core.errors import PlanError
from treering.technique import Applied, Claim, Site, Stage
from treering.techniques.quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Quantize(QuantizeSettings):
    """Weights W are stored as Q(W), frozen; adapters on them learn.

    format    int8, int4, int3, fp8, fp8_block, nf4, mxfp4 or nvfp4: see treering.formats
    targets   `all-linear`: linears of attention and MLP and experts inside the blocks, no routers; or patterns of names
    group     inputs that share a scale, of int4 and int3
    clip      max: the largest value of each group is kept; mse: groups saturate where that lowers the squared error

    Example:
        run = tr.compose("MODEL", [tr.Quantize(format="nf4"), tr.LoRA(rank=16)])
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        claims = []
        for matrix in self.matrices(anatomy):
            self.form(matrix, "float32")
            claims.append(Claim(fqn=matrix.weight, aspect="storage", setting="quantize.targets"))
            claims.append(Claim(fqn=matrix.module, aspect="forward", exclusive=False, setting="quantize.targets"))
        if not claims:
            raise PlanError(f"quantize: this {anatomy.model_type} model has no linear that is a target")
        return claims

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.quantize.install import install_packed

        return install_packed(model, self, site)
