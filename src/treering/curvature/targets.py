"""What gradients are measured of: matrices that train, and how the pair of a plain weight becomes their pairs.

An adapter's A and B have gradients made of the inputs and output gradients of the layer that they adapt, seen through
one another. `TrainedMatrix` says how; here the pairs of the layer are turned into theirs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import Matrix
from treering.curvature.capture import Pair, PairSink, capturable
from treering.technique import Maps, TrainedMatrix

if TYPE_CHECKING:
    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Target:
    """One trained tensor: a matrix, or a stack of experts' matrices.

    Attributes:
        name: its live name; of a plain weight the plain one.
        weight: the plain weight whose pairs show its gradient.
        outputs, inputs: N and M of its gradient.
        experts: how many matrices it stacks; None: it is one.
        matrices: how its pairs follow from those of `weight`, of a stack one for each expert; None: they are the same.
    """

    name: str
    weight: str
    outputs: int
    inputs: int
    experts: int | None = None
    matrices: tuple[TrainedMatrix, ...] | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions before N × M."""
        return () if self.experts is None else (self.experts,)

    def pair(self, pair: Pair) -> Pair:
        """Return the target's pair of the pair of its plain weight."""
        if self.matrices is None:
            return pair
        if self.experts is None:
            a, g = self._seen(self.matrices[0], pair.a_RM, pair.g_RN)
            return replace(pair, weight=self.name, a_RM=a, g_RN=g)
        assert pair.experts is not None
        a = pair.a_RM.new_zeros(len(pair.a_RM), self.inputs)
        g = pair.g_RN.new_zeros(len(pair.g_RN), self.outputs)
        for expert in pair.experts.unique().tolist():
            rows = pair.experts == expert
            one_a, one_g = self._seen(self.matrices[expert], pair.a_RM[rows], pair.g_RN[rows])
            a[rows], g[rows] = one_a.to(a.dtype), one_g.to(g.dtype)
        return replace(pair, weight=self.name, a_RM=a, g_RN=g)

    def _seen(self, matrix: TrainedMatrix, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (a if matrix.inputs is None else matrix.inputs(a)), (g if matrix.outputs is None else matrix.outputs(g))


class TargetPairs:
    """A sink of the pairs of plain weights, which gives those of their targets to another sink."""

    def __init__(self, targets: Iterable[Target], sink: PairSink):
        self.sink = sink
        self.by_weight: dict[str, list[Target]] = {}
        for target in targets:
            self.by_weight.setdefault(target.weight, []).append(target)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        for target in self.by_weight.get(pair.weight, ()):
            self.sink.take(target.pair(pair))


def targets_of(
    model: nn.Module, anatomy: "Anatomy", maps: Maps | None = None
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the targets inside the blocks by name, and why each other matrix is none.

    Args:
        model: with its techniques in place.
        anatomy: of the plain model.
        maps: what trains; None: the plain weights are looked at as if they all trained.
    """
    possible, reasons = capturable(model, anatomy)
    targets: dict[str, Target] = {}
    for weight, matrix in possible.items():
        if matrix.block is None:
            reasons[weight] = "it is outside the blocks"
        elif maps is None:
            targets[weight] = plain_target(matrix)
        elif weight not in maps:
            reasons[weight] = "nothing that trains for it is seen"
        else:
            for target in _trained(model, matrix, maps[weight]):
                targets[target.name] = target
    return targets, reasons


def plain_target(matrix: Matrix) -> Target:
    """Return the plain weight of a matrix as a target."""
    return Target(
        name=matrix.weight, weight=matrix.weight, outputs=matrix.outputs, inputs=matrix.inputs, experts=matrix.experts
    )


def _trained(model: nn.Module, matrix: Matrix, trained: tuple[TrainedMatrix, ...]) -> list[Target]:
    """Return the tensors that train for one plain weight."""
    by_name: dict[str, list[TrainedMatrix]] = {}
    for one in trained:
        by_name.setdefault(one.name, []).append(one)
    found = []
    for name, several in by_name.items():
        if name == matrix.weight and all(one.inputs is None and one.outputs is None for one in several):
            found.append(plain_target(matrix))
            continue
        *_, rows, columns = model.get_parameter(name).shape
        outputs, inputs = (columns, rows) if several[0].transposed else (rows, columns)
        found.append(
            Target(
                name=name,
                weight=matrix.weight,
                outputs=outputs,
                inputs=inputs,
                experts=matrix.experts,
                matrices=tuple(sorted(several, key=lambda one: one.expert or 0)),
            )
        )
    return found
