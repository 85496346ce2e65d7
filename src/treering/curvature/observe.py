"""Watching the linears of a live model: sums of a aᵀ over the tokens of every forward.

T tokens, M inputs. Products and sums are at least float32: a bfloat16 product would round away what small directions
hold. Each batch is added by one gemm into the float32 sum: the error grows like the root of the number of batches
times 6e-8, far below the 1e-2 by which any 30,000 tokens miss the mean of their kind, and a float64 sum would double
the memory, which is what a measurement takes most of. Of a float64 model everything is float64.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from treering.curvature.observer import Observer

if TYPE_CHECKING:
    from treering.anatomy import Anatomy


@contextmanager
def observe(
    model: nn.Module, anatomy: "Anatomy", *, weights: Iterable[str] | None = None, share: bool = True
) -> Iterator[Observer]:
    """Watch `model` while the body runs; nothing of it stays on the model afterwards.

    weights   plain names of those to watch; default: all linears in blocks, and all stacked experts
    share     find linears that see the same inputs (q, k and v), and measure them once
    """
    from treering.curvature.experts import watch_experts

    observer = Observer(anatomy, weights, share)
    chosen = set(observer.weights)
    undo: list[Callable[[], None]] = []
    try:
        _eager(model, undo)
        undo.append(model.register_forward_pre_hook(observer.begin, with_kwargs=True).remove)
        undo.append(model.register_forward_hook(observer.end, always_call=True).remove)
        for linear in anatomy.linears:
            if linear.block is not None and linear.weight in chosen:
                hook = _Hook(observer, linear.weight)
                undo.append(model.get_submodule(linear.fqn).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for experts in anatomy.experts:
            if chosen & set(experts.stacked):
                undo.append(watch_experts(observer, model, experts))
        yield observer
    finally:
        for one in reversed(undo):
            one()


def _eager(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    """What was compiled before does not know of the hooks, and would run without a word about them."""
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        undo.append(lambda: stance.__exit__(None, None, None))


@dataclass(frozen=True)
class _Hook:
    """Of one linear; an object, so that copying the module meets the observer (see `Observer.__reduce__`)."""

    observer: Observer
    weight: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.observer.take(self.weight, args[0] if args else next(iter(kwargs.values())))
