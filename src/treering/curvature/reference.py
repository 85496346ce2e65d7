"""The reference: moments from the definition, in float64, slowly. Every fast path is tested against it."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.anatomy.matrices import matrices

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


def document_gradients(
    model: nn.Module, anatomy: "Anatomy", document: Tensor, trained: Tensor | None = None
) -> dict[str, Tensor]:
    """Return dL/dW of every matrix by its plain name, […, N, M], by autograd, of one document alone, [T].

    L is the sum, not the mean, of −log p over the next tokens of the document, or over those where `trained`, [T], is
    true.
    """
    stacks = {stack.weight: stack for stack in matrices(anatomy)}
    chosen = {name: p for name, p in model.named_parameters() if name in stacks}
    logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
    each = F.cross_entropy(logits, document[1:], reduction="none")
    loss = each.sum() if trained is None else each[trained[1:]].sum()
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss, list(chosen.values()))
    return {name: stacks[name].oriented(gradient) for name, gradient in zip(chosen, gradients)}


def factors(
    model: nn.Module, anatomy: "Anatomy", documents: Iterable[Tensor], kind: str
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return A, S and c by weight, from their definitions, with every next token as label; of linear layers alone."""
    chosen = {linear.fqn: linear.weight for linear in anatomy.linears if linear.block is not None}
    sums: dict[str, dict[str, Any]] = {weight: {} for weight in chosen.values()}
    number = tokens = 0
    for document in documents:
        pairs = _pairs(model, chosen, document)
        number, tokens = number + 1, tokens + len(document) - 1
        for weight, (a, g) in pairs.items():
            G = g.mT @ a
            wa, wg = (1, 1) if kind in ("kfac", "ekfac") else (g.square().sum(1)[:, None], a.square().sum(1)[:, None])
            A, S = (G.mT @ G, G @ G.mT) if kind == "shampoo" else ((a * wa).mT @ a, (g * wg).mT @ g)
            cross = (a.square().sum(1) * g.square().sum(1)).sum()
            for name, value in (("A", A), ("S", S), ("trace", G.square().sum()), ("cross", cross)):
                sums[weight][name] = sums[weight].get(name, 0) + value
    result = {}
    for weight, one in sums.items():
        count, trace = number if kind == "shampoo" else tokens, one["trace"] / number
        A, S = one["A"] / count, one["S"] / count
        c = torch.tensor(tokens / number) if kind in ("kfac", "ekfac") else trace / (A.trace() * S.trace())
        result[weight] = A, S, c
    return result


def _pairs(model: nn.Module, chosen: dict[str, str], document: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and output gradients of linear layers, without the last token, which has no label."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(weight: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            y.retain_grad()
            seen[weight] = args[0], y

        return keep

    handles = [model.get_submodule(fqn).register_forward_hook(hook(weight)) for fqn, weight in chosen.items()]
    with torch.enable_grad():
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, document[1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    rows = {w: (a.detach().flatten(0, -2)[:-1], y.grad.flatten(0, -2)[:-1]) for w, (a, y) in seen.items()}  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    return rows
