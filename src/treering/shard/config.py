"""The technique `shard`: torch's fully_shard (FSDP2), block by block, with gradients summed and never averaged."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from treering.errors import PlanError
from treering.technique import Applied, Claim, Site, Stage

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Parameters, gradients and optimizer state sharded over the mesh's `shard` (and `sequence`) axes.

    compute   dtype of gathered parameters and arithmetic; `stored`: as the parameters are stored
    reduce    dtype in which gradients are summed over ranks
    reshard   free a block's gathered parameters after its forward, and gather them again for its backward
    offload   where shards rest between uses; also useful with one GPU and no launcher
    """

    compute: Literal["stored", "bfloat16", "float32"] = "stored"
    reduce: Literal["float32", "bfloat16", "stored"] = "float32"
    reshard: bool = True
    offload: Literal["none", "cpu"] = "none"

    stage: ClassVar[Stage] = Stage.SHARD

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        from treering.shard.units import plan_units

        names = {fqn for unit in plan_units(anatomy) for fqn in unit}
        return [Claim(fqn=fqn, aspect="sharding", setting="shard") for fqn in sorted(names)]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.shard.units import shard

        if site.mesh is None:
            raise PlanError("shard: there is no mesh; pass mesh=treering.mesh(shard=-1)")
        notes = shard(model, self, site)
        return Applied(notes=notes, resting="cpu" if self.offload == "cpu" else "device")
