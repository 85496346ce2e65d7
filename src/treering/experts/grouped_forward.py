"""The one forward of a module of stacked experts, and what techniques register with it.

transformers' experts modules share an interface: parameters `gate_up_proj` (or `up_proj`) and `down_proj` stacked over
experts, a gate, optional biases and a norm. This forward computes what its `grouped_mm` implementation computes, with
the same bits, and asks what was registered for each stack:

    source      where its weight comes from: a plain parameter, packed codes, factors
    addends     modules called with (rows, offsets), whose results are added to the product: adapters
    observers   objects that see the rows of each product, and may see its gradient: statistics

Nothing else replaces the forward of an experts module; tiles, and the exchange of rows between ranks (`dispatch.py`),
call it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.core.module_forward import (
    AddedForward,
    ModuleForward,
    Switchable,
    beneath,
    install,
    installed,
    remove,
)
from treering.experts.assigned import Arrivals, shown_local
from treering.experts.products import stack_product
from treering.experts.routing import Routing, route

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix


class StackSource(Protocol):
    """Where the weight of a stack comes from. An object, so that copies of the model refer to their own."""

    def product(self, x_SM: Tensor, routing: Routing) -> Tensor:
        """Return x Wᵀ, [S, N]."""
        ...


class ProductObserver(Protocol):
    def see(self, stack: str, x_SM: Tensor, y_SN: Tensor, routing: Routing) -> Tensor:
        """Called with the rows that a stack multiplies and their products, once for each forward. Returns the products:
        the same values, through which a gradient may be seen."""
        ...

    def counted(self, tokens: int) -> Tensor | None:
        """Return which of the `tokens` of this rank's batch count, [tokens]; None: all."""
        ...


class Addition:
    """An adapter of a stack. `off`: the number of `module_forward.switched_off` contexts that are active."""

    def __init__(self, addend: nn.Module):
        self.addend = addend
        self.off = 0


class Plain:
    """The weight of a plain parameter of the module."""

    def __init__(self, module: nn.Module, leaf: str, transposed: bool):
        self.module, self.leaf, self.transposed = module, leaf, transposed

    def product(self, x_SM: Tensor, routing: Routing) -> Tensor:
        weight = getattr(self.module, self.leaf)
        return stack_product(x_SM, weight.mT if self.transposed else weight, routing.offsets)


class GroupedForward(ModuleForward):
    """What is called in place of an experts module's forward.

    `addends` are called, while they are on, with (rows, offsets).

    Args:
        module: of a class that has transformers' experts interface; see `unsupported`.

    Attributes:
        local: how many experts this rank has; None: all. Others' rows are not given to this forward then, and what is
            given has no weights: whoever sent the rows weights the results.
        first: the first of them.
        arrivals: what observers need to know about rows that other ranks sent.
    """

    as_method = True

    def __init__(self, module: nn.Module):
        super().__init__(module)
        experts: Any = module
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.stacks = (first, "down_proj")
        self.sources: dict[str, StackSource] = {
            leaf: Plain(module, leaf, experts.is_transposed) for leaf in self.stacks
        }
        self.addends: dict[str, list[Addition]] = {leaf: [] for leaf in self.stacks}
        self.observers: list[ProductObserver] = []
        self.users = 0
        self.local: int | None = None
        self.first = 0
        self.arrivals: Arrivals | None = None

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.local is None:
            return self._compute(hidden, top_k_index, top_k_weights)
        with shown_local(self.module):  # tiles run this again in the backward, when what is around it has returned
            return self._compute(hidden, top_k_index, top_k_weights)

    def _compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts: Any = self.module
        routing = route(top_k_index, experts.num_experts if self.local is None else self.local)
        if self.arrivals is not None:
            if len(self.arrivals.counted) != len(hidden):
                raise PlanError(
                    f"experts of {type(experts).__name__} that are assigned to ranks are computed in tiles, so which "
                    "rows are padding is not known; measure a run without tiledmlp and tiledblock"
                )
            routing = replace(routing, first=self.first, counted=self.arrivals.counted[routing.tokens])
        first, second = self.stacks
        inner = self._product(first, hidden[routing.tokens], routing)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        out = self._product(second, inner, routing)
        if getattr(experts, "has_post_expert_norm", False):  # transformers before 5.20 has none
            out = experts.post_expert_norm(out)
        if self.local is not None:
            return routing.combine(out).to(hidden.dtype)
        weighted = out * top_k_weights.reshape(-1)[routing.order].unsqueeze(-1)
        return routing.combine(weighted).to(hidden.dtype)

    def _product(self, leaf: str, x: Tensor, routing: Routing) -> Tensor:
        y = self.sources[leaf].product(x, routing)
        experts: Any = self.module
        if experts.has_bias:
            y = y + getattr(experts, f"{leaf}_bias")[routing.experts]
        for addition in self.addends[leaf]:
            if not addition.off:
                y.add_(addition.addend(x, routing.offsets))  # in place: y is as large as the layer's activations
        for observer in self.observers:
            y = observer.see(leaf, x, y, routing)
        return y


def unsupported(module: nn.Module) -> str:
    """Return why this module cannot have a grouped forward, or the empty string."""
    experts: Any = module
    flags = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    if missing := [name for name in flags if not hasattr(experts, name)]:
        return f"{type(module).__name__} does not have transformers' experts interface ({missing[0]} is missing)"
    if getattr(experts, "_is_expert_parallel", False):
        return f"{type(module).__name__} is already split over ranks by transformers"
    return ""


def grouped(module: nn.Module, name: str) -> GroupedForward:
    """Return the grouped forward of a module, installed if it is not yet. `release` it when it is no longer used.

    Args:
        module: the experts module.
        name: its full name, for messages.
    """
    current = grouped_of(module)
    if not isinstance(current, GroupedForward):
        if reason := unsupported(module):
            raise PlanError(f"{name}: {reason}, so its experts cannot be adapted, quantized or measured")
        if current is not None:
            raise PlanError(
                f"{name}: its forward was replaced by {type(current).__name__}, which does not know experts"
            )
        current = GroupedForward(module)
        install(current)
    current.users += 1
    return current


def grouped_of(module: nn.Module) -> Any:
    """Return what replaces the module's forward; where experts are assigned to ranks, the grouped forward inside."""
    current = installed(module)
    return getattr(current, "grouped", current)


def grouped_beneath(module: nn.Module, name: str) -> GroupedForward:
    """Return the grouped forward beneath everything that replaces the module's forward, installed if it is not yet.

    Args:
        module: the experts module.
        name: its full name, for messages.
    """
    above: list[ModuleForward] = []
    current = installed(module)
    while isinstance(current, ModuleForward) and not isinstance(current, GroupedForward):
        above.append(current)
        current = beneath(current)
    reason = unsupported(module)
    if current is not None and not isinstance(current, GroupedForward):
        reason = f"its forward was replaced by {type(current).__name__}, which does not know experts"
    if reason:
        raise PlanError(
            f"{name}: {reason}, so its experts cannot be assigned to ranks. Leave expert out of the mesh",
            settings=("mesh.expert",),
        )
    if current is None and not above:
        return grouped(module, name)
    forward = current
    if forward is None:
        forward = GroupedForward(module)
        forward.replaced, above[-1].replaced = above[-1].replaced, forward.__call__
    forward.users += 1
    return forward


def add_to(module: nn.Module, matrix: "Matrix", addend: nn.Module) -> tuple[Switchable, Callable[[], None]]:
    """Add what `addend` gives, a child of `module`, to the product of a linear layer or of a stack of experts.

    Returns:
        What switches the addend off, and a function that removes it.
    """
    if not matrix.lead:
        added = AddedForward(module, addend)
        return added, install(added)
    forward, addition = grouped(module, matrix.module), Addition(addend)
    forward.addends[matrix.leaf].append(addition)
    return addition, release(forward, addition)


def release(
    forward: GroupedForward, addition: Addition | None = None, observer: "ProductObserver | None" = None
) -> Callable[[], None]:
    """Return what gives back one `grouped`, with the addition or the observer that it was for; the last one restores
    the module's own forward."""
    done = False

    def undo() -> None:
        nonlocal done
        if done:
            return
        done = True
        for additions in forward.addends.values():
            if addition in additions:
                additions.remove(addition)
        if observer in forward.observers:
            forward.observers.remove(observer)
        forward.users -= 1
        if not forward.users:
            remove(forward)

    return undo
