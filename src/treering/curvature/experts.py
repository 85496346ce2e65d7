"""Watching stacked experts: which tokens reach the weight of each, and what reaches the second weight.

No module stands for one expert, so that there is nothing to hook. transformers' own way of computing them ("eager")
multiplies one expert's tokens by one slice of the stacked parameter at a time; during the forward of the module its
products are looked at, and a slice tells by its place in memory whose it is.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward
from treering.technique import recompute_state

if TYPE_CHECKING:
    from treering.anatomy import Experts
    from treering.curvature.observer import Observer

_PRODUCTS = {F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, torch.bmm, Tensor.bmm}


def watch_experts(observer: "Observer", model: nn.Module, experts: "Experts") -> Callable[[], None]:
    """Replace the forward of this one module by one that is watched; returns undo."""
    module: Any = model.get_submodule(experts.fqn)
    for name in experts.stacked:
        if name.rpartition(".")[2] not in module._parameters:
            raise PlanError(
                f"{name} is not there as a plain parameter any more, so its experts' inputs cannot be measured; "
                "measure the exported model instead: treering measure DIR --data FILE --to DIR/statistics"
            )
    held = dict(vars(module))
    watched = _WatchedForward(module, observer, experts)
    if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
        module.config = copy.deepcopy(module.config)  # the model's own belongs to all of its modules
        module.config._experts_implementation = "eager"

    module.forward = watched

    def undo() -> None:
        for name in ("forward", "config"):
            if name in held:
                setattr(module, name, held[name])
            else:
                vars(module).pop(name, None)

    return undo


class _WatchedForward(ModuleForward):
    def __init__(self, module: nn.Module, observer: "Observer", experts: "Experts"):
        super().__init__(module)
        self.observer, self.experts = observer, experts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if recompute_state() != "forward":
            return self.call_former(*args, **kwargs)
        inputs = args[0] if args else next(iter(kwargs.values()))
        parameters: dict[str, Any] = self.module._parameters
        stacked = {name: parameters[name.rpartition(".")[2]] for name in self.experts.stacked}
        with _Watch(self.observer, self.experts, inputs, stacked) as watch:
            result = self.call_former(*args, **kwargs)
        watch.check()
        return result


class _Watch(TorchFunctionMode):
    """The products of one forward of one experts module. `inputs` [..., M]: the tokens as they come in."""

    def __init__(self, observer: "Observer", experts: "Experts", inputs: Tensor, stacked: dict[str, Tensor]):
        super().__init__()
        self.observer, self.experts, self.inputs, self.stacked = observer, experts, inputs, stacked
        self.seen: set[str] = set()
        self.picked: tuple[Tensor, Tensor] | None = None  # tokens that were picked of the inputs, and which
        self.tokens: dict[int, Tensor] = {}  # expert -> which tokens are its

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.__getitem__ and args[0] is self.inputs:
            if isinstance(args[1], Tensor) and args[1].ndim == 1:
                self.picked = result, args[1]
        elif func in _PRODUCTS:
            self._product(func, *(list(args) + list(kwargs.values()))[:2])
        return result

    def _product(self, func: Any, x: Tensor, w: Tensor) -> None:
        for name, parameter in self.stacked.items():
            storage = parameter.untyped_storage().data_ptr()
            if x.untyped_storage().data_ptr() == storage or w.untyped_storage().data_ptr() == storage:
                self._take(name, parameter, x, w if func is F.linear else w.mT)

    def _take(self, name: str, parameter: Tensor, x: Tensor, w: Tensor) -> None:
        """`w` N × M."""
        away = (w.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        expert, rest = divmod(away, parameter.stride(0))
        inputs = self.observer.sizes[name][-1]
        whole = parameter[0].mT if self.experts.transposed else parameter[0]
        if rest or w.shape != whole.shape or x.ndim != 2 or x.shape[1] != inputs:
            raise self._unknown(name)
        self.seen.add(name)
        if self.picked is not None and self.picked[0] is x:
            self.tokens[expert] = self.picked[1]
        if name in self.observer.weights and self.observer.owns(name, x):
            self.observer.add(name, self._real(name, expert, x).detach(), expert)

    def _real(self, name: str, expert: int, x: Tensor) -> Tensor:
        """The rows of `x` that count. The second product has the tokens of the first, in the same order."""
        real = self.observer.real
        if real is None:
            return x
        tokens = self.tokens.get(expert)
        together = tokens is not None and len(tokens) == len(x) and self.inputs.shape[:-1].numel() == len(real)
        self.observer.refuse_unless(together, name)
        return x[real[tokens]]

    def check(self) -> None:
        if self.inputs.numel() and (left := set(self.stacked) - self.seen):
            raise self._unknown(sorted(left)[0])

    def _unknown(self, name: str) -> PlanError:
        return PlanError(
            f"{self.observer.anatomy.model_type}: {self.experts.fqn} computes with {name} in a way that is not "
            "understood, so its experts' inputs cannot be measured; leave it out: observe(…, weights=[…])"
        )
