"""The technique `recompute`: keep the input of each block, and run the block again in the backward."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from treering.errors import ConfigError, PlanError
from treering.technique import Applied, Claim, Site, Stage

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy

Kept = Literal["attention", "all_to_all"]
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Of each block only the input is kept between forward and backward, one tensor of tokens × width.

    keep          what is kept besides, so that it is not computed twice: results of attention, of all-to-all messages
    offload       where the inputs wait for the backward; `cpu`: in pinned host memory
    first_blocks  offload only those of the first so many blocks; null: of all but the last, which is needed at once
    budget        offload, first blocks first, only as much as fits into so much host memory of a rank: 64GiB
    """

    keep: tuple[Kept, ...] = ()
    offload: Literal["none", "cpu"] = "none"
    first_blocks: int | None = None
    budget: str | None = None

    stage: ClassVar[Stage] = Stage.RECOMPUTE

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise ConfigError(f"keep is {self.keep!r}; write a list: [{self.keep}]", field="keep")
        for i, name in enumerate(self.keep):
            if name not in ("attention", "all_to_all"):
                raise ConfigError(f"keep has {name!r}; it may have attention and all_to_all", field=f"keep[{i}]")
        for setting in ("first_blocks", "budget"):
            if self.offload == "none" and getattr(self, setting) is not None:
                raise ConfigError(
                    f"{setting} says how much is offloaded, and offload is none; set offload to cpu, or leave "
                    f"{setting} out",
                    field=setting,
                )
        if self.first_blocks is not None and self.first_blocks < 1:
            raise ConfigError(
                f"first_blocks is {self.first_blocks}; it is at least 1. To offload nothing, set offload to none",
                field="first_blocks",
            )
        if self.first_blocks is not None and self.budget is not None:
            raise ConfigError("first_blocks and budget both say how much is offloaded; leave one out", field="budget")
        if self.budget is not None:
            read_bytes(self.budget)

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        from treering.topology import axis_size

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
        from treering.recompute.region import install

        return install(model, self, site)


def read_bytes(text: str) -> int:
    """A number of bytes as a person writes it: 64GiB, 512 MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"budget is {text!r}; write a size in KiB, MiB, GiB or TiB, such as 64GiB", field="budget")
    return int(float(found[1]) * UNITS[found[2]])
