"""Observing the linear layers and experts of a live model: sums of a aᵀ over the tokens of every forward.

T tokens, M inputs. Products and sums are at least float32: a bfloat16 product would round away what small directions
contain. In a loop of your own each batch is added by one gemm into a float32 sum, whose error grows like the root of
the number of batches times 6e-8; of a float64 model all is float64. `measure` adds to integers (`exact_sums.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.anatomy.matrices import of_experts
from treering.core.errors import PlanError
from treering.curvature.observer import Observer
from treering.curvature.sums import NewSum, Sum
from treering.experts.grouped_forward import GroupedForward, grouped, grouped_of, release, unsupported
from treering.experts.routing import Routing
from treering.experts.stacked_forward import ExpertProduct, watch_products
from treering.technique import recompute_state

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Experts


@contextmanager
def observe(
    model: nn.Module,
    anatomy: "Anatomy",
    *,
    weights: Iterable[str] | None = None,
    share: bool = True,
    new_sum: NewSum = Sum.empty,
) -> Iterator[Observer]:
    """Observe `model` while the body runs; nothing of it stays on the model afterwards.

    Args:
        model: a live transformers model.
        anatomy: of the plain model.
        weights: plain names of the weights to observe; default: all linear layers in blocks, and all stacked experts.
        share: find linear layers that see the same inputs (q, k and v), and measure them once.
        new_sum: makes what the inputs of a weight are added to.

    Returns:
        The observer, whose `statistics()` are the means of what was seen.

    Example:
        with observe(model, examine(model)) as seen:
            model(input_ids=ids)
        A = seen.statistics()["model.layers.0.mlp.up_proj.weight"]["inputs"]
    """
    observer = Observer(anatomy, weights, share, new_sum)
    chosen = set(observer.weights)
    undo: list[Callable[[], None]] = []
    try:
        run_eagerly(model, undo)
        undo.append(model.register_forward_pre_hook(observer.begin, with_kwargs=True).remove)
        undo.append(model.register_forward_hook(observer.end, always_call=True).remove)
        for linear in anatomy.linears:
            if linear.block is not None and linear.weight in chosen:
                hook = _LinearHook(observer, linear.weight)
                undo.append(model.get_submodule(linear.fqn).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for experts in anatomy.experts:
            if chosen & set(experts.stacked):
                undo.append(_observe_experts(observer, model, experts))
        yield observer
    finally:
        for one in reversed(undo):
            one()


def run_eagerly(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Run compiled modules eagerly: what was compiled before has no hooks, and would skip them without a message."""
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        undo.append(lambda: stance.__exit__(None, None, None))


@dataclass(frozen=True)
class _LinearHook:
    """The hook of one linear layer; an object, so that a copy of the module fails at `Observer.__reduce__`."""

    observer: Observer
    weight: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.observer.take(self.weight, args[0] if args else next(iter(kwargs.values())))


def _observe_experts(observer: Observer, model: nn.Module, experts: "Experts") -> Callable[[], None]:
    """Observe the products of stacked experts: in the grouped forward, whatever their weights are stored in; or, of a
    class that it does not know, in the class's own forward, which reads plain parameters."""
    module: Any = model.get_submodule(experts.fqn)
    stacks = of_experts(observer.anatomy, experts)
    present, plain = grouped_of(module), all(stack.leaf in module._parameters for stack in stacks)
    if isinstance(present, GroupedForward) or (plain and present is None and not unsupported(module)):
        forward = grouped(module, experts.fqn)
        rows = _GroupedInputs(observer, {stack.leaf: stack.weight for stack in stacks})
        forward.observers.append(rows)
        return release(forward, observer=rows)
    for stack in stacks:
        if not plain:
            raise PlanError(
                f"{stack.weight} is no longer a plain parameter, so its experts' inputs cannot be measured; "
                "measure the exported model instead: treering measure DIR --data FILE --to DIR/statistics"
            )
    return watch_products(module, stacks, _ExpertInputs(observer, experts.fqn))


@dataclass(frozen=True, eq=False)
class _GroupedInputs:
    """Adds the rows of grouped products to the sums of the observer, expert by expert. `weights`: by stack."""

    observer: Observer
    weights: Mapping[str, str]

    def see(self, stack: str, x_SM: Tensor, y_SN: Tensor, routing: Routing) -> Tensor:
        weight, observer = self.weights[stack], self.observer
        if recompute_state() == "forward" and weight in observer.weights and observer.owns(weight, x_SM):
            self._add(weight, x_SM, routing)
        return y_SN

    def _add(self, weight: str, x_SM: Tensor, routing: Routing) -> None:
        observer = self.observer
        rows, ends, real = x_SM.detach(), routing.offsets, routing.counted
        if real is None and observer.real is not None:
            observer.refuse_unless(len(rows) == len(observer.real) * routing.choices, weight)
            real = observer.real[routing.tokens]
        if real is not None:
            rows, ends = rows[real], torch.cumsum(torch.bincount(routing.experts[real], minlength=len(ends)), 0)
        start = 0
        for expert, end in enumerate(ends.tolist()):
            observer.add(weight, rows[start:end], routing.first + expert)
            start = end

    def counted(self, tokens: int) -> Tensor | None:
        real = self.observer.real
        self.observer.refuse_unless(real is None or len(real) == tokens, min(self.weights.values()))
        return real


@dataclass(frozen=True)
class _ExpertInputs:
    """Adds the inputs of each expert's product to the sums of the observer."""

    observer: Observer
    fqn: str

    def take(self, product: ExpertProduct) -> None:
        weight = product.matrix.weight
        if weight in self.observer.weights and self.observer.owns(weight, product.x):
            self.observer.add(weight, self._real(product).detach(), product.matrix.expert)

    def _real(self, product: ExpertProduct) -> Tensor:
        """Return the rows that count."""
        real, tokens = self.observer.real, product.tokens
        if real is None:
            return product.x
        known = tokens is not None and len(tokens) == len(product.x)
        known = known and product.hidden.shape[:-1].numel() == len(real)
        self.observer.refuse_unless(known, product.matrix.weight)
        return product.x[real[tokens]]

    def unknown(self, weight: str) -> PlanError:
        return PlanError(
            f"{self.observer.anatomy.model_type}: {self.fqn} computes with {weight} in a way that is not understood, "
            "so its experts' inputs cannot be measured; leave it out: observe(…, weights=[…])"
        )
