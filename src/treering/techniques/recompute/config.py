"""The technique `recompute`: keep the input of each block, and run the block again in the backward."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from treering.core.errors import PlanError
from treering.technique import Applied, Claim, Site, Stage, Variant
from treering.techniques.recompute.settings import RecomputeSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Recompute(RecomputeSettings):
    """Keep only the input of each block between forward and backward, one tensor of tokens × width.

    keep          what is kept in addition, so that it is not computed twice: results of attention, of
                  all-to-all messages
    offload       where the inputs are stored until the backward; `cpu`: in pinned host memory
    first_blocks  offload only the inputs of this many first blocks; null: of all but the last, which is needed at once
    budget        offload, first blocks first, only as much as fits into this much host memory of a rank: 64GiB
    prefetch      how many blocks ahead inputs are copied back while the backward runs, each of them on the device then;
                  null: two where an input is at most 16 MiB, for which a delay of the host weighs, and else one

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.Recompute(offload="cpu")])
    """

    stage: ClassVar[Stage] = Stage.RECOMPUTE

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        from treering.core.topology import axis_size

        blocks = len(anatomy.blocks)
        if self.first_blocks is not None and self.first_blocks > blocks:
            raise PlanError(
                f"recompute: first_blocks is {self.first_blocks} and the model has {blocks} blocks; write at most "
                f"{blocks}, or leave it out",
                settings=("recompute.first_blocks",),
            )
        if "attention" in self.keep and not anatomy.attentions:
            raise PlanError(
                f"recompute: keep names attention, and this {anatomy.model_type} model has none; leave it out",
                settings=("recompute.keep",),
            )
        if "all_to_all" in self.keep and axis_size(mesh, "sequence", "expert") == 1:
            raise PlanError(
                "recompute: keep names all_to_all, and nothing is exchanged: the mesh has sequence=1 and expert=1. "
                "Leave it out",
                settings=("recompute.keep",),
            )
        return [Claim(fqn=block.fqn, aspect="region", setting="recompute") for block in anatomy.blocks]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.recompute.recomputed_block import install

        return install(model, self, site)

    @classmethod
    def lighter(cls) -> tuple[Variant, ...]:
        """Return recompute itself, and recompute with the inputs of blocks in host memory."""

        def away(now: "Recompute | None") -> "Recompute | None":
            return None if now is None or now.offload == "cpu" else replace(now, offload="cpu")

        return (
            Variant(name="recompute", config="recompute:", order=20, of=lambda now: None if now else cls()),
            Variant(name="activations in host memory", config="recompute: {offload: cpu}", order=40, of=away),
        )
