"""The technique `compile`: torch.compile, one block at a time and in place."""

from collections.abc import Sequence
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

    What runs in tiles is not compiled: `explain()` lists it.

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

        return Applied(undo=undo, notes=(f"{len(blocks)} blocks, backend {self.backend}", *_left_out(blocks)))


def _left_out(blocks: "Sequence[nn.Module]") -> list[str]:
    """Return a line about what stays uncompiled in a block, if anything does."""
    found = {name for block in blocks for name, module in block.named_modules() if _uncompiled(module)}
    if not found:
        return []
    return [f"not compiled, because they run in tiles: {', '.join(sorted(found))} of each block"]


def _uncompiled(module: "nn.Module") -> bool:
    from treering.core.module_forward import ModuleForward, beneath, installed

    forward = installed(module)
    while isinstance(forward, ModuleForward):
        if forward.uncompiled:
            return True
        forward = beneath(forward)
    return False
