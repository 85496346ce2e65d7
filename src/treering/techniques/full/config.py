"""The technique `full`: train plain parameters as they are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from treering.core.errors import PlanError
from treering.technique import Applied, Claim, Site, Stage, TrainedMatrix

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train plain parameters: each that a pattern of `train` matches and none of `freeze` does.

    A pattern is the last part of a module's name (`q_proj`) or a glob on the complete name (`model.layers.1?.*`).

    Example:
        run = tr.compose("MODEL", [tr.Full(train=("model.layers.*",))])
    """

    train: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()

    stage: ClassVar[Stage] = Stage.ADAPT

    def names(self, anatomy: "Anatomy") -> tuple[str, ...]:
        """Return the names of the parameters that are trained."""
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
            raise PlanError("full: `freeze` excludes everything that `train` matches; nothing is left to train")
        return [Claim(fqn=n, aspect="gradient", needs=("plain_weight",), setting="full.train") for n in names]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        names = self.names(site.anatomy)
        return Applied(
            trainable=names, maps=_maps(site.anatomy, names), notes=(f"trains {len(names)} plain parameters",)
        )


def _maps(anatomy: "Anatomy", names: tuple[str, ...]) -> dict[str, tuple[TrainedMatrix, ...]]:
    """Return where the inputs and output gradients of the matrices among `names` are seen.

    A head tied to the embedding is left out, because its gradient is that of both. So are linears of mixers, whose
    weight a model may read without calling the module.
    """
    tied = None if anatomy.head is None else anatomy.head.tied_to
    maps: dict[str, tuple[TrainedMatrix, ...]] = {
        linear.weight: (TrainedMatrix(name=linear.weight, module=linear.fqn, transposed=linear.transposed),)
        for linear in anatomy.linears
        if linear.weight in names and linear.weight != tied and linear.role != "mixer"
    }
    for stack in anatomy.experts:
        for name in set(stack.stacked) & set(names):
            maps[name] = tuple(
                TrainedMatrix(name=name, module=stack.fqn, expert=expert, transposed=stack.transposed)
                for expert in range(stack.number)
            )
    return maps
