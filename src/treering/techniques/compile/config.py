"""The technique `compile`: torch.compile, one block at a time and in place."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from treering.technique import Applied, Claim, Site, Stage

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Compile:
    """Compile blocks one by one: they share one compiled function, and FSDP's hooks stay between them.

    `dynamic: true` compiles one kernel for all lengths; `null` lets torch decide after the first change of shape.

    Example:
        run = tr.compose("MODEL", [tr.LoRA(rank=16), tr.Compile()])
    """

    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    dynamic: bool | None = None

    stage: ClassVar[Stage] = Stage.COMPILE

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        return [Claim(fqn=block.fqn, aspect="compiled", setting="compile") for block in anatomy.blocks]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        blocks = [model.get_submodule(block.fqn) for block in site.anatomy.blocks]
        for block in blocks:
            block.compile(backend=self.backend, dynamic=self.dynamic)  # in place: names stay as they are

        def undo() -> None:
            for block in blocks:
                block._compiled_call_impl = None

        return Applied(undo=undo, notes=(f"{len(blocks)} blocks, backend {self.backend}",))
