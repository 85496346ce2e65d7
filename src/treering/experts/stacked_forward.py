"""The forward of a module of stacked experts: weights shown to it, and the products that it computes with each expert.

No module stands for one expert, so there is nothing to hook. The module's own forward reads its stacked parameters
slice by slice, and both classes leave that forward as it is:

    ShownWeights      the module reads weights that are computed for one forward, and are not its parameters
    watch_products    reports each product of tokens with one expert's slice
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from treering.anatomy.matrices import Matrix
from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward, install, undo_all
from treering.technique import recompute_state

_PRODUCTS = {F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, torch.bmm, Tensor.bmm}


class ShownWeights(ModuleForward):
    """Compute with weights that are made for one forward, in place of stacked parameters that were removed.

    Args:
        module: holds the experts, and has no attribute of the names in `weights`.
        weights: name of the attribute -> a child of the module, which takes the tokens and returns them with the
            weight. The tokens pass through it so that FSDP knows when its backward is over.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, nn.Module]):
        super().__init__(module)
        self.weights = dict(weights)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        shown = []
        try:
            for leaf, compute in self.weights.items():
                hidden, weight = compute(hidden)
                setattr(self.module, leaf, weight)
                shown.append(leaf)
            return self.call_former(hidden, *args, **kwargs)
        finally:
            for leaf in shown:
                delattr(self.module, leaf)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertProduct:
    """One product x Wᵀ of tokens with one expert's weight.

    Attributes:
        matrix: the weight, with `expert` set.
        x: [T, M], its inputs.
        tokens: [T], which rows of `hidden` they come from; None: unknown.
        hidden: […, width], the tokens that were given to the module.
    """

    matrix: Matrix
    x: Tensor
    tokens: Tensor | None
    hidden: Tensor


class ProductWatcher(Protocol):
    """An object, not functions, so that copying the model meets what it refers to (see `ModuleForward`)."""

    def take(self, product: ExpertProduct) -> None: ...
    def unknown(self, weight: str) -> PlanError: ...


def watch_products(module: Any, stacks: Sequence[Matrix], watcher: ProductWatcher) -> Callable[[], None]:
    """Report every product of the module's first forwards (not of recomputed ones) to `watcher`. Returns the undo.

    transformers' "eager" implementation multiplies one expert's tokens by one slice at a time, and is switched on for
    this module. A slice is recognized by its address. What is computed in another way is an error, `watcher.unknown`.
    """
    undo: list[Callable[[], None]] = []
    if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
        undo.append(_restore(module, "config"))
        module.config = copy.deepcopy(module.config)  # the model's own belongs to all of its modules
        module.config._experts_implementation = "eager"
    undo.append(install(_WatchedForward(module, stacks, watcher)))
    return undo_all(undo)


def _restore(module: nn.Module, name: str) -> Callable[[], None]:
    before, own = getattr(module, name), name in vars(module)

    def restore() -> None:
        if own:
            setattr(module, name, before)
        else:
            vars(module).pop(name, None)

    return restore


class _WatchedForward(ModuleForward):
    def __init__(self, module: nn.Module, stacks: Sequence[Matrix], watcher: ProductWatcher):
        super().__init__(module)
        self.stacks, self.watcher = tuple(stacks), watcher
        self.experts = {stack.weight: stack.each() for stack in stacks}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if recompute_state() != "forward":
            return self.call_former(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        with _Products(self, hidden) as products:
            result = self.call_former(*args, **kwargs)
        products.check()
        return result


class _Products(TorchFunctionMode):
    """The products of one forward of one experts module."""

    def __init__(self, forward: _WatchedForward, hidden: Tensor):
        super().__init__()
        self.forward, self.watcher, self.hidden = forward, forward.watcher, hidden
        parameters: dict[str, Any] = forward.module._parameters
        self.parameters = [(stack, parameters[stack.leaf]) for stack in forward.stacks]
        self.seen: set[str] = set()
        self.picked: tuple[Tensor, Tensor] | None = None  # tokens that were selected from `hidden`, and which
        self.tokens: dict[int, Tensor] = {}  # expert -> which tokens it has

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.__getitem__ and args[0] is self.hidden:
            if isinstance(args[1], Tensor) and args[1].ndim == 1:
                self.picked = result, args[1]
        elif func in _PRODUCTS:
            self._product(func, *(list(args) + list(kwargs.values()))[:2])
        return result

    def _product(self, func: Any, x: Tensor, w: Tensor) -> None:
        for stack, parameter in self.parameters:
            storage = parameter.untyped_storage().data_ptr()
            if x.untyped_storage().data_ptr() == storage or w.untyped_storage().data_ptr() == storage:
                self._take(stack, parameter, x, w if func is F.linear else w.mT)

    def _take(self, stack: Matrix, parameter: Tensor, x: Tensor, W: Tensor) -> None:
        """`W` is N × M."""
        offset = (W.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        expert, rest = divmod(offset, parameter.stride(0))
        if rest or W.shape != (stack.outputs, stack.inputs) or x.ndim != 2 or x.shape[1] != stack.inputs:
            raise self.watcher.unknown(stack.weight)
        self.seen.add(stack.weight)
        # The second product has the tokens of the first one, in the same order.
        if self.picked is not None and self.picked[0] is x:
            self.tokens[expert] = self.picked[1]
        matrix, tokens = self.forward.experts[stack.weight][expert], self.tokens.get(expert)
        self.watcher.take(ExpertProduct(matrix=matrix, x=x, tokens=tokens, hidden=self.hidden))

    def check(self) -> None:
        """Every stack was used, or there was no token."""
        unused = {stack.weight for stack in self.forward.stacks} - self.seen
        if self.hidden.numel() and unused:
            raise self.watcher.unknown(min(unused))
