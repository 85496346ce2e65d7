"""Form `update`: the weight itself trains; its gradient and its step are projected.

    the optimizer sees   P_out G P_in
    its step Δ becomes   c · P_out Δ P_in      c: see protection.scale

Exact whatever the optimizer does with the gradient, because what it did is projected again. Once a step, never per
micro-batch; nothing is folded in at export, for the weight is plain all along.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.technique import Applied, LazyTensor, Part, Site
from treering.techniques.osft import coverage, protection
from treering.techniques.osft.held import Held
from treering.techniques.osft.steps import Steps
from treering.techniques.osft.targets import Target

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


def attach(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Target]) -> Applied:
    parts: dict[str, Part] = {}
    held: dict[str, Held] = {}
    dtypes = {target.weight: model.get_parameter(target.weight).dtype for target in chosen}
    for target in chosen:  # all are looked at before the first is touched
        dtype = dtypes[target.weight]
        if dtype not in (torch.float32, torch.float64):
            raise PlanError(
                f"osft: form update steps {target.weight} itself, and in {str(dtype).removeprefix('torch.')} rounding "
                "would leak into what is held. Set model.dtype to float32 (with shard, compute: bfloat16 keeps the "
                "arithmetic as it is), or use form one_sided, which leaves the weight alone",
                settings=("model.dtype", "techniques.osft.form"),
            )
    for target in chosen:
        if (own := _hold(model, config, site, target, dtypes[target.weight])) is not None:
            held[target.weight], parts[target.weight] = own
    names = tuple(target.weight for target in chosen)
    steps = Steps(model, names, held, anchored=config.anchor, cached=config.wire == "cached")
    return Applied(
        trainable=names,
        parts=parts,
        gradients=steps.project,
        before_step=steps.remember,
        after_step=steps.retract,
        metrics=steps.metrics,
        notes=(_note(len(names), sum(bool(one.sides) for one in held.values())),),
    )


def _note(weights: int, protected: int) -> str:
    bare = f", {weights - protected} are not" if protected < weights else ""
    return f"{weights} weights train as they are: {protected} are protected{bare}"


def _hold(
    model: nn.Module, config: "OSFTSettings", site: Site, target: Target, dtype: torch.dtype
) -> tuple[Held, Part] | None:
    sides = protection.sides(config, target)
    if not sides and not config.anchor:
        return None
    module, leaf = model.get_submodule(target.module), target.weight.rpartition(".")[2]
    child = "osft" if leaf == "weight" else f"osft_{leaf}"
    freezes = config.unmeasured == "freeze"
    held = Held(target, sides, dtype, site.mesh, anchored=config.anchor, freezes=freezes)
    module.add_module(child, held)
    own = f"{target.module}.{child}"

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        made = protection.operators(sides, target, config.soften, weight.read, statistics)
        scale = protection.scale(sides, made, target, coverage.frozen(config, statistics))
        tensors = {f"{own}.scale": scale} | held.values(own, made)
        return tensors | ({f"{own}.before": weight.read()} if config.anchor else {})

    part = Part(
        names=tuple(f"{own}.{name}" for name, _ in held.named_buffers()),
        split=split,
        join=lambda tensors, below: below,
        tolerance=0.0,
        joins=(),
        cost=protection.cost(sides, target),
        identity=f"{protection.identity(config, sides)} anchor {config.anchor}",
        measured=config.protect != "weights",
        saved=False,
    )
    return held, part
