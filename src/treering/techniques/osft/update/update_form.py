"""Form `update`: the weight itself trains; its gradient and its step are projected.

    the optimizer sees   P_out G P_in
    its step Δ becomes   c · P_out Δ P_in      c: see operators.scale

Exact for any optimizer, because its step is projected as well. Once a step, never per micro-batch; export has nothing
to add, because the weight is plain all the time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import Matrix
from treering.core.errors import PlanError
from treering.curvature import Statistics
from treering.technique import Applied, LazyTensor, Part, Site, TrainedMatrix
from treering.techniques.osft.protection import operators
from treering.techniques.osft.protection.coverage import frozen
from treering.techniques.osft.update.operator_buffers import OperatorBuffers
from treering.techniques.osft.update.update_steps import UpdateSteps

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


def install(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Matrix]) -> Applied:
    """Store the operators of `chosen` next to their weights and return what runs around an optimizer's step."""
    parts: dict[str, Part] = {}
    stored: dict[str, OperatorBuffers] = {}
    dtypes = {matrix.weight: model.get_parameter(matrix.weight).dtype for matrix in chosen}
    refuse_narrow(config, dtypes)
    first = _first_of_same_inputs(config, site, chosen, dtypes)
    for matrix in chosen:
        shared = stored.get(first[matrix.weight])
        if (pair := _store(model, config, site, matrix, dtypes[matrix.weight], shared)) is not None:
            stored[matrix.weight], part = pair
            if part.names:
                parts[matrix.weight] = part
    cached = config.communication == "cached"
    steps = UpdateSteps(model, list(dtypes), stored, keep_initial=config.keep_initial, cached=cached)
    return Applied(
        trainable=tuple(dtypes),
        parts=parts,
        gradients=steps.project,
        before_step=steps.remember,
        after_step=steps.retract,
        metrics=steps.metrics,
        messages=steps.messages,
        maps={m.weight: _trained(m, stored.get(m.weight)) for m in chosen},
        notes=(_note(len(dtypes), [buffers for buffers in stored.values() if buffers.shapes]),),
    )


def refuse_narrow(config: "OSFTSettings", dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise a PlanError where a weight that is to be changed has a dtype that rounds its steps away."""
    for weight, dtype in dtypes.items():
        if dtype not in (torch.float32, torch.float64):
            raise PlanError(
                f"osft: form {config.chosen_form} changes {weight} itself, and in "
                f"{str(dtype).removeprefix('torch.')} rounding would change protected directions. Set model.dtype to "
                "float32 (with shard, compute: bfloat16 keeps the arithmetic as it is), or use form one_sided, which "
                "does not change the weight",
                settings=("model.dtype", "techniques.osft.form"),
            )


def _first_of_same_inputs(
    config: "OSFTSettings", site: Site, chosen: Sequence[Matrix], dtypes: Mapping[str, torch.dtype]
) -> dict[str, str]:
    """Return for each weight the first one that reads the same inputs and is protected alike: q, k and v; gate and up.

    The measurement knows: it has one moment for weights that see the same tensor. Operators made from a weight itself
    are its own.
    """
    entries = site.statistics.entries if isinstance(site.statistics, Statistics) else {}
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for matrix in chosen:
        key: tuple[object, ...] = (matrix.weight,)
        if config.protect == "inputs" and matrix.weight in entries:
            shapes = operators.operator_shapes(config, matrix)
            key = entries[matrix.weight].key, shapes, matrix.lead, matrix.transposed, dtypes[matrix.weight]
        found[matrix.weight] = first.setdefault(key, matrix.weight)
    return found


def _trained(matrix: Matrix, buffers: OperatorBuffers | None) -> tuple[TrainedMatrix, ...]:
    """Return where the gradient that the optimizer sees is made of, of a weight with or without operators."""
    if buffers is not None:
        return buffers.trained()
    return tuple(
        TrainedMatrix(name=matrix.weight, module=matrix.module, expert=one.expert, transposed=matrix.transposed)
        for one in matrix.each()
    )


def _note(weights: int, protected: Sequence[OperatorBuffers]) -> str:
    number, stored = len(protected), len({id(buffers.source) for buffers in protected})
    bare = f", {weights - number} are not" if number < weights else ""
    shared = f", with {stored} operators, because some read the same inputs" if stored < number else ""
    return f"{weights} weights train as they are: {number} are protected{bare}{shared}"


def _store(
    model: nn.Module,
    config: "OSFTSettings",
    site: Site,
    matrix: Matrix,
    dtype: torch.dtype,
    shared: OperatorBuffers | None,
) -> tuple[OperatorBuffers, Part] | None:
    """Put the operators of a weight into its module, or none of its own where they are `shared`."""
    shapes = operators.operator_shapes(config, matrix)
    if not shapes and not config.keep_initial:
        return None
    child = "osft" if matrix.leaf == "weight" else f"osft_{matrix.leaf}"
    freezes = config.unmeasured == "freeze"
    buffers = OperatorBuffers(
        matrix,
        shapes,
        dtype,
        site.mesh,
        keep_initial=config.keep_initial,
        precision=torch.bfloat16 if config.precision == "bfloat16" else None,
        freezes=freezes,
        shared=shared,
    )
    model.get_submodule(matrix.module).add_module(child, buffers)
    prefix = f"{matrix.module}.{child}"

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        initial = {f"{prefix}.before": weight.read()} if config.keep_initial else {}
        if shared is not None:
            return initial
        # Of a stack it may be some of the experts.
        some = matrix if matrix.experts is None else replace(matrix, experts=weight.shape[0])
        bases = operators.bases(shapes, some, config.damping, weight.read, statistics)
        scale = operators.scale(shapes, bases, some, frozen(config, statistics))
        return {f"{prefix}.scale": scale} | buffers.values(prefix, bases) | initial

    part = Part(
        names=tuple(f"{prefix}.{name}" for name, _ in buffers.named_buffers()),
        split=split,
        join=lambda tensors, below: below,
        tolerance=0.0,
        joins=(),
        independent_rows=matrix.experts is not None,
        cost=operators.cost(shapes, matrix) if shared is None else 0.0,
        identity=f"{operators.identity(config, shapes)} anchor {config.keep_initial}",
        measured=config.protect != "weights",
        saved=False,
    )
    return buffers, part
