"""Functions of logits that never exist all at once: the run's objective, distillation, log-probabilities, values.

N trained tokens, H hidden width, V vocabulary. `head` is the module that computes logits from hidden states, adapters
included; objectives are evaluated on softcap · tanh(scale · head(h) / softcap), in float32 or wider.

The run's loss calls the model's forward with targets: it runs all modules before the head, selects trained tokens and
calls the head with these and what the objective needs there; the head's forward evaluates the objective in tiles. Both
are called as modules, so whatever gathers their weights does so exactly as it does for logits.

    -100 as a target: that token is not trained, gives 0 and has no gradient
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.anatomy.blocks import body
from treering.core import module_forward
from treering.objectives import (
    IGNORED,
    INPUTS,
    CrossEntropy,
    Distill,
    Objective,
    ObjectiveRows,
    OutputHead,
    objective_values,
    widened,
)
from treering.objectives.trained import trained_positions
from treering.technique import Applied, Site
from treering.techniques.tiling.mlp import sums_wide
from treering.techniques.tiling.settings import BUDGET
from treering.techniques.tiling.tile import SHORTEST_TRAINED, TiledRegion, tile_length

if TYPE_CHECKING:
    from treering.anatomy import Head
    from treering.technique import Batch
    from treering.techniques.tiling.settings import TiledLossSettings

Selection = Callable[[Tensor], Tensor]  # of trained positions: [B, S, …] to [N, …]


class TiledHead:
    """The functions below for one head, `size` tokens at a time. `wide`: see `tile`."""

    def __init__(self, head: OutputHead, *, name: str = "head", setting: str = "tiledloss"):
        self.head, self.region = head, TiledRegion(name, [head.module], setting)

    def objective(self, hidden_NH: Tensor, rows: ObjectiveRows, *, size: int, wide: bool = True) -> Tensor:
        """Return the sum of an objective over all rows, with the gradient of each tile computed along with it."""
        names = tuple(rows.values)

        def fn(h: Tensor, *values: Tensor) -> Tensor:
            return rows.sum_of(self.head.logits(h), dict(zip(names, values)))

        return self._run(fn, hidden_NH, *rows.values.values(), size=size, out="sum", wide=wide)

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        size: int,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        wide: bool = True,
    ) -> Tensor:
        """Return `CrossEntropy` summed over tokens. hidden […, H], targets […]."""
        hidden, targets = _flat(hidden, targets)
        objective = CrossEntropy(label_smoothing=label_smoothing, z_loss=z_loss)
        rows = ObjectiveRows(objective, {"targets": targets})
        return self.objective(hidden, rows, size=size, wide=wide)

    def distillation(
        self,
        hidden: Tensor,
        teacher: OutputHead,
        teacher_hidden: Tensor,
        targets: Tensor,
        *,
        size: int,
        temperature: float = 1.0,
        reverse: bool = False,
        wide: bool = True,
    ) -> Tensor:
        """Return Σ over trained tokens of T² · KL(teacher ‖ student), or of (student ‖ teacher) if `reverse`.

        Logits of both are computed tile by tile; the teacher has no gradient. T²: gradients as large as at T = 1.
        """

        hidden, targets = _flat(hidden, targets)
        objective = Distill(teacher="given", temperature=temperature, divergence="reverse" if reverse else "forward")

        @torch.no_grad()
        def logits(other: Tensor) -> Tensor:
            return teacher.logits(other)

        other = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
        rows = ObjectiveRows(objective, {"targets": targets, "teacher_hidden": other}, logits)
        return self.objective(hidden, rows, size=size, wide=wide)

    def log_probabilities(self, hidden: Tensor, targets: Tensor, *, size: int, wide: bool = True) -> Tensor:
        """Return log p(target) of each token, in the shape of `targets`; 0 where that is -100."""

        def fn(h: Tensor, t: Tensor) -> Tensor:
            return -F.cross_entropy(self.head.logits(h), t, ignore_index=IGNORED, reduction="none")

        return self._run(fn, *_flat(hidden, targets), size=size, out="cat", wide=wide).view(targets.shape)

    def values(self, hidden: Tensor, *, size: int, wide: bool = True) -> Tensor:
        """Return what a value or reward head gives for each token: its outputs as they are, [..., outputs]."""
        outputs = self._run(self.head.logits, hidden.reshape(-1, hidden.shape[-1]), size=size, out="cat", wide=wide)
        return outputs.view(*hidden.shape[:-1], *outputs.shape[1:])

    def _run(self, fn: Callable[..., Any], *tokens: Tensor, size: int, out: Any, wide: bool) -> Any:
        return self.region(fn, *tokens, size=size, out=out, wide=wide)


def _flat(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)


def install_loss(model: nn.Module, config: "TiledLossSettings", site: Site) -> Applied:
    """Install the tiled loss on head and model, as `TiledLoss` describes it."""
    anatomy_head = site.anatomy.head
    assert anatomy_head is not None, "claims refuse a model without a head"
    head: Any = model.get_submodule(anatomy_head.fqn)
    vocabulary = model.get_parameter(anatomy_head.weight).shape[0]
    head_forward = _HeadForward(head, config, anatomy_head, vocabulary)
    undone = [module_forward.install(head_forward), module_forward.install(_ModelForward(model, body(model), head))]
    long = f"{config.budget or BUDGET:g} GiB of logits" if config.tile == "budget" else f"{config.tile} tokens"
    if config.tile == "budget" and config.budget is None:
        long += f", or, where the head trains, {SHORTEST_TRAINED:,} tokens if those are more,"
    objective = None
    if config.label_smoothing or config.z_loss:
        objective = CrossEntropy(label_smoothing=config.label_smoothing, z_loss=config.z_loss)
    note = f"head and objective on {long} at a time"
    return Applied(loss=tiled_loss, objective=objective, undo=module_forward.undo_all(undone), notes=(note,))


class _HeadForward(module_forward.ModuleForward):
    """Logits; or, given the rows of an objective, their sum, in tiles."""

    returns_objective = True

    def __init__(self, module: nn.Module, config: "TiledLossSettings", anatomy_head: "Head", vocabulary: int):
        super().__init__(module)
        self.config, self.vocabulary = config, vocabulary
        head = OutputHead(
            module=module, scale=anatomy_head.scale, softcap=anatomy_head.softcap, forward=self.call_former
        )
        self.tiled = TiledHead(head, name=anatomy_head.fqn)

    def __call__(self, hidden: Tensor, rows: ObjectiveRows | None = None) -> Tensor:
        if rows is None:
            return self.call_former(hidden)
        config, budget = self.config, self.config.budget or BUDGET
        width = 4 * rows.objective.copies * self.vocabulary
        size = tile_length(config.tile, budget, width, hidden.shape[-1])
        if config.tile == "budget" and config.budget is None and self.tiled.region.trains():
            size = max(size, SHORTEST_TRAINED)
        return self.tiled.objective(
            hidden, rows, size=size, wide=sums_wide(self.tiled.region, config.accumulate, budget)
        )


class _ModelForward(module_forward.ModuleForward):
    """The output of the model; or, given how to select trained positions, the sum of an objective there."""

    def __init__(self, module: nn.Module, body: nn.Module, head: nn.Module):
        super().__init__(module)
        self.body, self.head = body, head

    def __call__(
        self,
        *args: Any,
        treering_select: "Selection | None" = None,
        treering_values: ObjectiveRows | None = None,
        **kwargs: Any,
    ) -> Any:
        if treering_select is None:
            return self.call_former(*args, **kwargs)
        hidden_BSH = self.body(*args, **kwargs, use_cache=False).last_hidden_state
        if treering_values is None:  # the head is still called: other ranks wait for its gathers and reductions
            return widened(self.head(treering_select(hidden_BSH))[:0]).sum()
        return self.head(treering_select(hidden_BSH), treering_values.select(treering_select))


def tiled_loss(model: nn.Module, batch: "Batch", objective: Objective) -> Tensor:
    """Return the sum of `objective` over the trained positions of `batch`."""
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    trained = trained_positions(batch)
    if trained.number == 0:
        return model(**inputs, treering_select=lambda x: x[:1, 0])
    return model(**inputs, treering_select=trained.rows, treering_values=objective_values(objective, batch))
