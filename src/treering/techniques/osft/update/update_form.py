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
    for weight, dtype in dtypes.items():  # all are checked before the first is changed
        if dtype not in (torch.float32, torch.float64):
            raise PlanError(
                f"osft: form update steps {weight} itself, and in {str(dtype).removeprefix('torch.')} rounding would "
                "change protected directions. Set model.dtype to float32 (with shard, compute: bfloat16 keeps the "
                "arithmetic as it is), or use form one_sided, which does not change the weight",
                settings=("model.dtype", "techniques.osft.form"),
            )
    for matrix in chosen:
        if (pair := _store(model, config, site, matrix, dtypes[matrix.weight])) is not None:
            stored[matrix.weight], parts[matrix.weight] = pair
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
        notes=(_note(len(dtypes), sum(bool(buffers.shapes) for buffers in stored.values())),),
    )


def _trained(matrix: Matrix, buffers: OperatorBuffers | None) -> tuple[TrainedMatrix, ...]:
    """Return where the gradient that the optimizer sees is made of, of a weight with or without operators."""
    if buffers is not None:
        return buffers.trained()
    return tuple(
        TrainedMatrix(name=matrix.weight, module=matrix.module, expert=one.expert, transposed=matrix.transposed)
        for one in matrix.each()
    )


def _note(weights: int, protected: int) -> str:
    bare = f", {weights - protected} are not" if protected < weights else ""
    return f"{weights} weights train as they are: {protected} are protected{bare}"


def _store(
    model: nn.Module, config: "OSFTSettings", site: Site, matrix: Matrix, dtype: torch.dtype
) -> tuple[OperatorBuffers, Part] | None:
    shapes = operators.operator_shapes(config, matrix)
    if not shapes and not config.keep_initial:
        return None
    child = "osft" if matrix.leaf == "weight" else f"osft_{matrix.leaf}"
    freezes = config.unmeasured == "freeze"
    buffers = OperatorBuffers(matrix, shapes, dtype, site.mesh, keep_initial=config.keep_initial, freezes=freezes)
    model.get_submodule(matrix.module).add_module(child, buffers)
    prefix = f"{matrix.module}.{child}"

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        # Of a stack it may be some of the experts.
        some = matrix if matrix.experts is None else replace(matrix, experts=weight.shape[0])
        bases = operators.bases(shapes, some, config.damping, weight.read, statistics)
        scale = operators.scale(shapes, bases, some, frozen(config, statistics))
        tensors = {f"{prefix}.scale": scale} | buffers.values(prefix, bases)
        return tensors | ({f"{prefix}.before": weight.read()} if config.keep_initial else {})

    part = Part(
        names=tuple(f"{prefix}.{name}" for name, _ in buffers.named_buffers()),
        split=split,
        join=lambda tensors, below: below,
        tolerance=0.0,
        joins=(),
        independent_rows=matrix.experts is not None,
        cost=operators.cost(shapes, matrix),
        identity=f"{operators.identity(config, shapes)} anchor {config.keep_initial}",
        measured=config.protect != "weights",
        saved=False,
    )
    return buffers, part
