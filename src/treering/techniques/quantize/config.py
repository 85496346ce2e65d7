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
    from treering.anatomy.matrices import Matrix
    from treering.formats import Format


@dataclass(frozen=True, kw_only=True)
class Quantize(QuantizeSettings):
    """Weights W are stored as Q(W), frozen; adapters on them learn.

    format    stored: as the folder holds them; or encode them now: int8, int4, int3, fp8, fp8_block, nf4, mxfp4, nvfp4
    targets   `all-linear`: linears of attention and MLP and experts inside the blocks, no routers; or patterns of names
    group     inputs that share a scale, of int4 and int3
    clip      max: the largest value of each group is kept; mse: groups saturate where that lowers the squared error
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE

    def matrices(self, anatomy: "Anatomy") -> "tuple[Matrix, ...]":
        """Return the matrices that are quantized."""
        from treering.anatomy.matrices import all_linear, matrices
        from treering.anatomy.names import matches

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

        settings = {"group": self.group} if self.group is not None else {}
        if self.format in ("int8", "int4", "int3", "fp8"):
            settings["scale_dtype"] = scale_dtype
        form = formats.named(self.format, **settings)
        if reason := form.refusal(matrix.outputs, matrix.inputs):
            raise PlanError(
                f"quantize: {matrix.weight}: {reason}. Leave it out of quantize.targets, or use another format: int8 and "
                "fp8 take any shape",
                settings=("quantize.format",),
            )
        return form

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        claims = []
        for matrix in self.matrices(anatomy):
            if self.format != "stored":
                self.form(matrix, "float32")
            claims.append(Claim(fqn=matrix.weight, aspect="storage", setting="quantize.targets"))
            claims.append(Claim(fqn=matrix.module, aspect="forward", exclusive=False, setting="quantize.targets"))
        if not claims:
            raise PlanError(f"quantize: this {anatomy.model_type} model has no linear that is a target")
        return claims

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.quantize.install import install_packed

        return install_packed(model, self, site)
