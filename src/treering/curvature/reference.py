"""The reference: moments from the definition, in float64, slowly. Every fast path is tested against it."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from treering.anatomy import Anatomy


def moments(
    model: nn.Module, anatomy: "Anatomy", documents: Iterable[Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return (1/T) Σ_t a_t a_tᵀ and T by weight, over the tokens of `documents`, each [T] and alone in its forward.

    Without stacked experts: which tokens reach them depends on the architecture (see the tests).
    """
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def hook(weight: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            for a in args[0].reshape(-1, args[0].shape[-1]).double():
                total[weight] = total.get(weight, 0) + torch.outer(a, a)
                count[weight] = count.get(weight, 0) + 1

        return keep

    handles = [
        model.get_submodule(linear.fqn).register_forward_pre_hook(hook(linear.weight))
        for linear in anatomy.linears
        if linear.block is not None
    ]
    with torch.no_grad():
        for ids in documents:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return {weight: value / count[weight] for weight, value in total.items()}, count
