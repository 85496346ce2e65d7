"""The technique `shard`: torch's fully_shard (FSDP2), block by block, with gradients summed and never averaged."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from treering.core.errors import PlanError
from treering.core.topology import axis_size
from treering.technique import Applied, Claim, Site, Stage, Variant
from treering.techniques.shard.settings import ShardSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Shard(ShardSettings):
    """Shard parameters, gradients and optimizer state over the mesh's `shard` (and `sequence`) axes.

    Where the mesh has `expert`, stacked experts are assigned to ranks and sharded over those with the same experts;
    tokens are sent to their experts and back.

    compute   dtype of gathered parameters and arithmetic; `stored`: as the parameters are stored
    reduce    dtype in which gradients are summed over ranks
    reshard   free a block's gathered parameters after its forward, and gather them again for its backward
    offload   where shards are stored between uses; also useful with one GPU and no launcher
    hold      what stays complete on each rank between the micro-batches of a step. `gradients`: they are summed over
              ranks once a step, in its last backward. `all`: so are they, and parameters are gathered once a step

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.Shard(compute="bfloat16")], mesh=tr.mesh())
    """

    stage: ClassVar[Stage] = Stage.SHARD

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        from treering.techniques.shard.expert_units import check_experts
        from treering.techniques.shard.units import plan_units

        ranks = axis_size(mesh, "expert")
        check_experts(anatomy, ranks)
        names = {fqn for unit in plan_units(anatomy, experts=ranks > 1) for fqn in unit}
        return [Claim(fqn=fqn, aspect="sharding", setting="shard") for fqn in sorted(names)]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.shard.units import Hold, shard

        if site.mesh is None:
            raise PlanError("shard: there is no mesh; pass mesh=treering.mesh(shard=-1)")
        notes, traffic = shard(model, self, site)
        resting: Literal["device", "cpu"] = "cpu" if self.offload == "cpu" else "device"
        applied = Applied(notes=notes, resting=resting, messages=traffic.messages)
        if self.hold == "nothing":
            return applied
        hold = Hold(model, parameters=self.hold == "all")
        return replace(applied, batch=hold.count, gradients=hold.check)

    def for_teacher(self, student: "Anatomy", mesh: "DeviceMesh | None") -> "Shard":
        """Return the same sharding for a model that has no backward: what is gathered is freed after each block."""
        return replace(self, hold="nothing", reshard=True)

    @classmethod
    def lighter(cls) -> tuple[Variant, ...]:
        """Return the variant whose shards, and the optimizer's state with them, are in host memory."""

        def of(now: "Shard | None") -> "Shard | None":
            return None if now is not None and now.offload == "cpu" else replace(now or cls(), offload="cpu")

        name = "parameters and optimizer in host memory"
        return (Variant(name=name, config="shard: {offload: cpu}", order=50, of=of),)
