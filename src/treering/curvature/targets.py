"""What gradients are measured of: matrices that train, and how the pair of a plain weight becomes their pairs.

An adapter's A and B have gradients made of the inputs and output gradients of the layer that they adapt, seen through
one another. `TrainedMatrix` says how; here the pairs of the layer are turned into theirs. So are those of a bias, one
more input that is 1, and those of a side as wide as the vocabulary, which is projected before anything is summed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import Matrix, of_experts, of_linear
from treering.curvature.capture import capturable
from treering.curvature.pairs import Pair, PairSink
from treering.curvature.parts import SeenPart, parts_of
from treering.curvature.vocabulary import BLOCKS, Coverage, VocabularySide
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
        bias: the bias that trains with it, whose gradient is the last column; None: there is none.
        in_blocks: it is a matrix inside the blocks, whose inputs are measured without gradients as well.
        projected: its gradient is projected to N × M.
    """

    name: str
    weight: str
    outputs: int
    inputs: int
    experts: int | None = None
    matrices: tuple[TrainedMatrix, ...] | None = None
    bias: str | None = None
    in_blocks: bool = True
    projected: bool = False

    @property
    def moment(self) -> tuple[int, ...] | None:
        """The shape of the second moment of the inputs of its plain weight; None: it is not measured with it."""
        M = self.inputs - (self.bias is not None)
        return (*self.lead, M, M) if self.matrices is None and self.in_blocks else None

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions before N × M."""
        return () if self.experts is None else (self.experts,)

    def pair(self, pair: Pair) -> Pair:
        """Return the target's pair of the pair of its plain weight."""
        if self.matrices is None and self.bias is None:
            return pair
        if self.matrices is None:
            ones = pair.a_RM.new_ones(len(pair.a_RM), 1)
            return replace(pair, a_RM=torch.cat([pair.a_RM, ones], 1), source_RM=pair.a_RM)
        if self.experts is None:
            a, g = self._seen(self.matrices[0], pair.a_RM, pair.g_RN)
            dtype = torch.promote_types(a.dtype, g.dtype)
            return replace(pair, weight=self.name, a_RM=a.to(dtype), g_RN=g.to(dtype))
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
    model: nn.Module, anatomy: "Anatomy", maps: Maps | None = None, coverage: Coverage = BLOCKS
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the targets by name, and why each other matrix, or with `all` each other parameter, is none.

    Args:
        model: with its techniques in place.
        anatomy: of the plain model.
        maps: what trains; None: the plain weights are looked at as if they all trained.
        coverage: matrices inside the blocks, or all parameters.
    """
    possible, reasons = capturable(model, anatomy)
    biases = biases_of(anatomy) if coverage.of == "all" else {}
    trains = partial(_trains, model) if maps is not None else (lambda name: name in anatomy.parameters)
    targets: dict[str, Target] = {}
    for weight, matrix in possible.items():
        bias = biases.get(weight)
        bias = bias if bias is not None and trains(bias) else None
        if matrix.block is None and coverage.of == "blocks":
            reasons[weight] = "it is outside the blocks"
            continue
        if maps is not None and weight not in maps:
            reasons[weight] = "nothing that trains for it is seen"
            found = []
        else:
            found = [plain_target(matrix)] if maps is None else _trained(model, matrix, maps[weight])
        if matrix.block is None and [one.matrices for one in found] not in ([None], []):
            reasons[weight] = "an adapter of it trains, outside the blocks"
            continue
        for target in _with_bias(matrix, found, bias):
            targets[target.name] = _of_vocabulary(target, anatomy, coverage)
    if coverage.of == "all":
        found_parts, others = parts_of(model, anatomy)
        reasons |= others
        for name, part in found_parts.items():
            if trains(name):
                targets[name] = _part_target(part, coverage)
            else:
                reasons[name] = "it does not train"
        covered = {name for target in targets.values() for name in (target.weight, target.bias)}
        for bias in biases.values():
            if bias not in covered and bias not in targets:
                reasons[bias] = "it does not train" if not trains(bias) else "its layer cannot be seen"
    return targets, reasons


def _trains(model: nn.Module, name: str) -> bool:
    try:
        return model.get_parameter(name).requires_grad
    except AttributeError:
        return False


def biases_of(anatomy: "Anatomy") -> dict[str, str]:
    """Return the bias of each linear layer and stack that has one, by weight."""
    found = {linear.weight: linear.bias for linear in anatomy.linears if linear.bias is not None}
    for experts in anatomy.experts:
        found |= {name: f"{name}_bias" for name in experts.stacked if f"{name}_bias" in experts.biases}
    return found


def plain_sizes(anatomy: "Anatomy") -> dict[str, tuple[int, int]]:
    """Return N and M of each linear layer and of each matrix of a stack, without a bias, by weight."""
    each = [of_linear(linear) for linear in anatomy.linears]
    each += [stack for experts in anatomy.experts for stack in of_experts(anatomy, experts)]
    return {matrix.weight: (matrix.outputs, matrix.inputs) for matrix in each}


def plain_target(matrix: Matrix) -> Target:
    """Return the plain weight of a matrix as a target."""
    return Target(
        name=matrix.weight,
        weight=matrix.weight,
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        experts=matrix.experts,
        in_blocks=matrix.block is not None,
    )


def _with_bias(matrix: Matrix, found: list[Target], bias: str | None) -> list[Target]:
    """Return the targets of a matrix, of which the plain one has its bias; or the bias is a target of its own."""
    if bias is None:
        return found
    if [one.matrices for one in found] == [None]:
        return [replace(found[0], inputs=matrix.inputs + 1, bias=bias)]
    one = TrainedMatrix(name=bias, module=matrix.module, inputs=_ones)
    alone = Target(
        name=bias,
        weight=matrix.weight,
        outputs=matrix.outputs,
        inputs=1,
        experts=matrix.experts,
        matrices=(one,) * (matrix.experts or 1),
        in_blocks=False,
    )
    return [*found, alone]


def _ones(a: Tensor) -> Tensor:
    return a.new_ones(len(a), 1)


def _of_vocabulary(target: Target, anatomy: "Anatomy", coverage: Coverage) -> Target:
    """Return a target whose outputs are projected where they are the vocabulary."""
    head = anatomy.head
    if head is None or target.weight != head.weight or target.outputs <= coverage.vocabulary:
        return target
    side = VocabularySide(name=target.weight, side="gradients", size=target.outputs, kept=coverage.vocabulary)
    matrix = TrainedMatrix(
        name=target.name, module=head.fqn, outputs=side.rows_of, inputs=_with_one if target.bias else None
    )
    return replace(target, outputs=coverage.vocabulary, matrices=(matrix,), projected=True)


def _with_one(a: Tensor) -> Tensor:
    return torch.cat([a, _ones(a)], 1)


def _part_target(part: SeenPart, coverage: Coverage) -> Target:
    target = Target(name=part.name, weight=part.name, outputs=part.outputs, inputs=part.inputs, in_blocks=False)
    if part.kind != "embedding":
        return target
    kept, counts = min(part.inputs, coverage.vocabulary), coverage.counts.get(part.name)
    side = VocabularySide(name=part.name, side="inputs", size=part.inputs, kept=kept, counts=counts)
    matrix = TrainedMatrix(name=part.name, module=part.module, inputs=side.columns_of)
    return replace(target, inputs=kept, matrices=(matrix,), projected=kept < part.inputs)


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
