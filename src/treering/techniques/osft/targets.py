"""Which weights are held, as matrices with inputs and outputs, however they are stored."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from treering.anatomy import Anatomy, Role, select_parameters
from treering.core.errors import PlanError

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear's weight, or one stack of experts. `transposed`: stored with inputs before outputs."""

    weight: str  # plain parameter
    module: str  # that holds it
    outputs: int
    inputs: int
    experts: int | None
    transposed: bool
    block: int | None
    role: Role

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        matrix = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def rank(self) -> int:
        return min(self.outputs, self.inputs)


def oriented(value: Tensor, target: Target) -> Tensor:
    """[…, outputs, inputs] of the stored weight, a view; and the stored one of that."""
    return value.mT if target.transposed else value


def targets(config: "OSFTSettings", anatomy: Anatomy) -> tuple[Target, ...]:
    """In the model's order. Patterns choose by the weight's name or by its module's."""
    known = {target.weight: target for target in (*_linears(anatomy), *_experts(anatomy))}
    if config.targets == "all-linear":
        chosen = [t for t in known.values() if t.block is not None and t.role in ("attention", "mlp", "experts")]
    else:
        chosen = []
        for parameter in select_parameters(anatomy, config.targets):
            if parameter.name in known:
                chosen.append(known[parameter.name])
            elif len(parameter.shape) > 1:
                raise PlanError(
                    f"osft: {parameter.name} ({parameter.role}) is no linear layer; leave it out of osft.targets, or "
                    "train it unprotected with osft.train",
                    settings=("techniques.osft.targets",),
                )
    if not chosen:
        raise PlanError(
            f"osft: no weight of this {anatomy.model_type} model is a target; see osft.targets",
            settings=("techniques.osft.targets",),
        )
    order = {name: i for i, name in enumerate(anatomy.parameters)}
    return tuple(sorted(chosen, key=lambda t: order[t.weight]))


def others(config: "OSFTSettings", anatomy: Anatomy, chosen: tuple[Target, ...]) -> tuple[str, ...]:
    """Plain parameters that learn without protection because the user says so."""
    if not config.train:
        return ()
    held = {target.weight for target in chosen}
    return tuple(p.name for p in select_parameters(anatomy, config.train) if p.name not in held)


def _linears(anatomy: Anatomy) -> list[Target]:
    tied = None if anatomy.head is None else anatomy.head.tied_to
    return [
        Target(
            weight=linear.weight,
            module=linear.fqn,
            outputs=linear.outputs,
            inputs=linear.inputs,
            experts=None,
            transposed=linear.transposed,
            block=linear.block,
            role=linear.role,
        )
        for linear in anatomy.linears
        if linear.weight != tied  # a step of the head would be one of the embedding as well
    ]


def _experts(anatomy: Anatomy) -> list[Target]:
    found = []
    for experts in anatomy.experts:
        for name in experts.stacked:
            number, first, second = anatomy.parameters[name].shape
            found.append(
                Target(
                    weight=name,
                    module=experts.fqn,
                    outputs=second if experts.transposed else first,
                    inputs=first if experts.transposed else second,
                    experts=number,
                    transposed=experts.transposed,
                    block=experts.block,
                    role="experts",
                )
            )
    return found
