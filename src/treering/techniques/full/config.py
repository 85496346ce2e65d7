"""The technique `full`: train plain parameters as they are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from treering.core.errors import PlanError
from treering.technique import Applied, Claim, Site, Stage

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every plain parameter that a pattern of `train` matches and none of `freeze` does is trained.

    A pattern is the last part of a module's name (`q_proj`) or a glob on the whole name (`model.layers.1?.*`).
    """

    train: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()

    stage: ClassVar[Stage] = Stage.ADAPT

    def names(self, anatomy: "Anatomy") -> tuple[str, ...]:
        from treering.anatomy import matches

        for pattern in (*self.train, *self.freeze):
            if not any(matches(name, pattern) for name in anatomy.parameters):
                some = ", ".join(list(anatomy.parameters)[:4])
                raise PlanError(f"full: the pattern {pattern!r} matches no parameter; there are {some}, …")
        chosen = (n for n in anatomy.parameters if any(matches(n, p) for p in self.train))
        return tuple(n for n in chosen if not any(matches(n, p) for p in self.freeze))

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        names = self.names(anatomy)
        if not names:
            raise PlanError("full: `freeze` takes away everything that `train` matches; nothing is left to train")
        return [Claim(fqn=n, aspect="gradient", needs=("plain_weight",), setting="full.train") for n in names]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        names = self.names(site.anatomy)
        return Applied(trainable=names, notes=(f"trains {len(names)} plain parameters",))
