"""The technique `quantize`: weights stored as codes of a number format, and decoded where they multiply."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from treering.core.errors import PlanError
from treering.technique import Applied, Claim, ParameterAspect, Site, Stage, StoredTensor, Technique
from treering.techniques.quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy
    from treering.anatomy.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class Quantize(QuantizeSettings):
    """Weights W are stored as Q(W), frozen, and adapters on them learn; or W stay and multiply as Q(W).

    format    int8, int4, int3, fp8, fp8_block, nf4, mxfp4 or nvfp4: see treering.formats
              stored: what the folder holds quantized stays as it is; the default for such folders
    targets   `all-linear`: linears of attention and MLP and experts inside the blocks, no routers; or patterns of names
    group     inputs that share a scale, of int4 and int3
    clip      max: the largest value of each group is kept; mse: groups saturate where that lowers the squared error
    global_scale  of nvfp4. matrix: each matrix has its own; merged: q, k and v, and gate and up, share one, as engines
              that merge them need it (these weights are read once more at the start)
    storage   packed: frozen codes and scales in place of the weights; fake: the weights stay, to be trained (`full`) or
              adapted, and are quantized where they multiply
    cast      of storage: fake. The dtype to which weights are rounded before they are quantized: bfloat16 where
              shard.compute is bfloat16 and model.dtype is not

    Example:
        run = tr.compose("MODEL", [tr.Quantize(format="nf4"), tr.LoRA(rank=16)])
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE

    @classmethod
    def for_stored(cls) -> "Quantize":
        """Return the technique for a folder with quantized weights, if the user names none."""
        return cls(format="stored")

    def with_stored(self, stored: Mapping[str, StoredTensor]) -> Technique:
        """Return the technique that keeps `stored`, by plain name, as it is; of another format this one."""
        if self.format != "stored":
            return self
        if not stored:
            raise PlanError(
                "quantize: format is stored, and the model has no weights that its folder holds quantized. Name a "
                "number format, such as nvfp4; with model.dequantize they are decoded, so leave quantize out",
                settings=("quantize.format",),
            )
        return Stored(weights=stored)

    def resolve(self, anatomy: "Anatomy", source: Any, statistics: Any) -> "Quantize":
        """Return the technique with the largest values of matrices that share a scale, if some do."""
        if self.global_scale == "matrix" or source is None:
            return self
        from treering.techniques.quantize.merged_scales import largest_values

        settings = {one.name: getattr(self, one.name) for one in fields(Quantize)}
        return SharedScales(**settings, largest=largest_values(self.matrices(anatomy), source.tensors))

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        claims = []
        for matrix in self.matrices(anatomy):
            self.form(matrix, "float32")
            aspect: ParameterAspect = "storage" if self.storage == "packed" else "value"
            claims.append(Claim(fqn=matrix.weight, aspect=aspect, setting="quantize.targets"))
            if not matrix.lead:  # experts keep their grouped forward, around which tiles may be
                claims.append(Claim(fqn=matrix.module, aspect="forward", exclusive=False, setting="quantize.targets"))
        if not claims:
            raise PlanError(f"quantize: this {anatomy.model_type} model has no linear that is a target")
        return claims

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.quantize.install import install_fake, install_packed

        if self.storage == "fake":
            return install_fake(model, self, site)
        return install_packed(model, self, site)


@dataclass(frozen=True, kw_only=True)
class SharedScales(Quantize):
    """What `Quantize(global_scale="merged")` becomes once the weights have been looked at.

    Attributes:
        largest: the largest absolute value of all matrices that share a scale with one, by its plain name.
    """

    largest: Mapping[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Weights that a folder holds quantized, kept bit for bit: what `Quantize(format="stored")` becomes.

    Attributes:
        weights: by plain name. Those that are not of a linear layer or of experts are decoded instead.
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE
    keeps_stored: ClassVar[bool] = True
    weights: Mapping[str, StoredTensor] = field(repr=False)  # the folder's digest identifies them in a checkpoint

    def matrices(self, anatomy: "Anatomy") -> "tuple[Matrix, ...]":
        """Return the matrices that are kept."""
        from treering.anatomy.matrices import matrices

        return tuple(matrix for matrix in matrices(anatomy) if matrix.weight in self.weights)

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        claims = []
        remedy = "set model.dequantize to true, which decodes what the folder holds quantized"
        for matrix in self.matrices(anatomy):
            claims.append(Claim(fqn=matrix.weight, aspect="storage", remedy=remedy))
            if not matrix.lead:
                claims.append(Claim(fqn=matrix.module, aspect="forward", exclusive=False, remedy=remedy))
        return claims

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.quantize.install import install_stored

        return install_stored(model, self.matrices(site.anatomy), self.weights)
