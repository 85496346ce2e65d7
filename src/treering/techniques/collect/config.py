"""The technique `collect`: an index of the gradients of training, row by row, while it trains."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from treering.technique import Applied, Claim, Site, Stage
from treering.techniques.collect.settings import CollectSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Collect(CollectSettings):
    """Write a row of an index for each document of each step: what its gradient was when it was trained on.

    Nothing about training changes. With another curvature than `identity` the run needs statistics with gradients of
    what trains (`treering measure --gradients`), measured before.

    to         the folder of the index
    kind       what is kept of a gradient: random projections (psift), the largest coordinates in the eigenbasis of the
               curvature (eigen-topk), or all of it (exact)
    curvature  which statistics whiten it
    size       numbers of each side of a matrix, of psift
    entries    coordinates of a matrix, of eigen-topk
    damping    added to eigenvalues, in units of their mean
    seed       of the projections
    cover      matrices inside the blocks, or all: biases, norms, routers, embedding and head as well

    Example:
        run = tr.compose("MODEL", [tr.LoRA(rank=16), tr.Collect(curvature="identity")])
    """

    stage: ClassVar[Stage] = Stage.OBSERVE

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        return []

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.collect.install import install

        return install(model, self, site)
