"""Inputs and output gradients of a model's matrices, seen together in the backward.

The output y of a layer passes through an identity that saves the layer's inputs a with autograd and, in the backward,
has the gradient g of y: all that the gradient of the layer's weight is made of, Σ_t g_t a_tᵀ. Because autograd keeps a,
a block that is recomputed gets it from its second pass, an offloaded one from the host, and a tile from the tile: each
row is seen once, and nothing is kept that the backward would not keep for a trained weight.

R rows that reach a layer, M inputs, N outputs, T tokens of this rank's batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from treering.anatomy.matrices import Matrix, of_experts, of_linear
from treering.core.errors import PlanError
from treering.core.module_forward import installed, undo_all
from treering.curvature.batch_tokens import BatchTokens, LayerRows
from treering.curvature.observe import run_eagerly
from treering.curvature.pairs import Capture, PairSink
from treering.curvature.parts import first_input, parts_of, rows_of_call, see_output, see_parts
from treering.experts.grouped_forward import GroupedForward, grouped_beneath, grouped_of, release, unsupported
from treering.experts.routing import Routing
from treering.technique import TileRows, tile_rows

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Experts


@contextmanager
def capture(model: nn.Module, anatomy: "Anatomy", weights: Iterable[str], sink: PairSink) -> Iterator[Capture]:
    """Give `sink` the pairs of `weights` in every backward of the body; nothing stays on the model afterwards.

    Args:
        model: a live transformers model, with or without techniques.
        anatomy: of the plain model.
        weights: plain names of linear layers and stacks of experts, see `capturable`, and of `parts_of`.
        sink: is called in the backward, layer by layer.
    """
    seen = Capture(sink)
    undo: list[Callable[[], None]] = []
    try:
        run_eagerly(model, undo)
        seen.begins = _is_plain(model)
        if seen.begins:
            undo.append(_frozen(model))
        undo.append(install_capture(model, anatomy, weights, seen, rooted=not seen.begins))
        yield seen
    finally:
        undo_all(undo)()


def install_capture(
    model: nn.Module, anatomy: "Anatomy", weights: Iterable[str], seen: Capture, *, rooted: bool = True
) -> Callable[[], None]:
    """Install the identities of `weights`. Returns a function that removes them.

    Args:
        rooted: let gradients begin at the embedding, also of weights that do not train.
    """
    chosen, undo = set(weights), list[Callable[[], None]]()
    known = {*(one.weight for one in anatomy.linears), *(name for one in anatomy.experts for name in one.stacked)}
    try:
        if rooted:
            undo.append(_rooted(model))
        for linear in anatomy.linears:
            if linear.weight in chosen:
                hook = _LinearOutput(seen, linear.weight)
                undo.append(see_output(model.get_submodule(linear.fqn), hook, lowest=False))
        for experts in anatomy.experts:
            if chosen & set(experts.stacked):
                undo.append(_see_experts(model.get_submodule(experts.fqn), anatomy, experts, chosen, seen))
        if chosen - known:
            undo += see_parts(model, parts_of(model, anatomy)[0], chosen, seen)
    except BaseException:
        undo_all(undo)()
        raise
    return undo_all(undo)


def capturable(model: nn.Module, anatomy: "Anatomy") -> tuple[dict[str, Matrix], dict[str, str]]:
    """Return the matrices whose gradients can be seen, by weight, and why each of the others cannot."""
    tied = None if anatomy.head is None else anatomy.head.tied_to
    possible: dict[str, Matrix] = {}
    reasons: dict[str, str] = {}
    for linear in anatomy.linears:
        if linear.weight == tied:
            reasons[linear.weight] = "it is both embedding and head"
        elif linear.role == "mixer":
            reasons[linear.weight] = "a mixer may read it without calling its module"
        else:
            possible[linear.weight] = of_linear(linear)
    for experts in anatomy.experts:
        module = model.get_submodule(experts.fqn)
        reason = "" if isinstance(grouped_of(module), GroupedForward) else unsupported(module)
        for stack in of_experts(anatomy, experts):
            if reason:
                reasons[stack.weight] = reason
            else:
                possible[stack.weight] = stack
    return possible, reasons


def _is_plain(model: nn.Module) -> bool:
    """Return whether all forwards are those of the classes: no technique, and no sharding, that needs gradients of its
    own."""
    return not any(
        isinstance(m, FSDPModule) or installed(m) is not None or getattr(m, "gradient_checkpointing", False)
        for m in model.modules()
    )


def _frozen(model: nn.Module) -> Callable[[], Any]:
    """Let the backward compute no gradients of parameters, which nobody looks at."""
    trained = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.requires_grad_(False)
    return partial(trained.requires_grad_, True)


def _rooted(model: nn.Module) -> Callable[[], None]:
    """Let gradients reach every layer where nothing trains: the graph begins at the token embedding."""

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        if torch.is_grad_enabled() and not y.requires_grad:
            return y.detach().requires_grad_()
        return None

    return model.get_input_embeddings().register_forward_hook(hook).remove  # type: ignore[operator]


@dataclass(frozen=True)
class _LinearOutput:
    """The hook of one linear layer; an object, so that a copy of the module fails at `Capture.__reduce__`."""

    seen: Capture
    weight: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        x = first_input(args, kwargs)
        if not isinstance(x, Tensor):  # a block in tiles: the layer is called again in each tile, with its rows
            return y
        count = y.numel() // y.shape[-1]
        return self.seen.see(self.weight, x, y, partial(rows_of_call, self.weight, count))


@dataclass(frozen=True, eq=False)
class _GroupedOutputs:
    """The observer of one grouped forward. `weights`: by stack."""

    seen: Capture
    weights: Mapping[str, str]

    def see(self, stack: str, x_SM: Tensor, y_SN: Tensor, routing: Routing) -> Tensor:
        weight = self.weights.get(stack)
        if weight is None:
            return y_SN
        if routing.counted is not None or routing.first:
            raise PlanError(
                f"{weight} is assigned to ranks (mesh: expert), so rows of other ranks' documents reach it; gradients "
                "of its experts cannot be seen there: leave expert out of the mesh",
                settings=("mesh.expert",),
            )
        tokens, tile = routing.tokens, tile_rows()
        if tile is not None and not tile.of_tokens:
            raise PlanError(
                f"{weight} is computed by groups of experts, so which expert a row is for is not known; set experts to "
                "tokens",
                settings=("tiledmlp.experts", "tiledblock.experts"),
            )

        def rows(batch: BatchTokens, tile: TileRows | None) -> LayerRows:
            return batch.routed(weight, tokens, len(tokens) // routing.choices, tile)

        return self.seen.see(weight, x_SM, y_SN, rows, routing.experts)

    def counted(self, tokens: int) -> Tensor | None:
        return None


def _see_experts(
    module: nn.Module, anatomy: "Anatomy", experts: "Experts", chosen: set[str], seen: Capture
) -> Callable[[], None]:
    forward = grouped_beneath(module, experts.fqn)
    stacks = {stack.leaf: stack.weight for stack in of_experts(anatomy, experts) if stack.weight in chosen}
    observer = _GroupedOutputs(seen, stacks)
    forward.observers.append(observer)
    return release(forward, observer=observer)
