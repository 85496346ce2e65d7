"""Projecting V of each matrix of an 8B block, (I − Q Qᵀ) V, in three forms that give the same.

V is M × l and learns, Q is M × h and is protected; h + l = min(N, M), and a quarter of the directions learns.

    gram       G = Q Qᵀ is made, then V − G V        2 M² (h + l) operations a matrix; what mini_trainer does
    factored   V − Q (Qᵀ V)                          4 M h l; ours
    cached     V − G V with a G that is kept         2 M² l, and M² numbers of memory
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.record import Figure

TRAINED = 0.25


def rows(context: Context) -> Iterator[Figure]:
    from treering.techniques.osft.forward_factors.passes import project

    device = context.device.torch_device
    for name, (outputs, inputs) in context.sizes.matrices.items():
        rank = min(outputs, inputs)
        low = int(TRAINED * rank)
        draw = torch.Generator(device).manual_seed(0)
        Q = torch.randn(inputs, rank - low, generator=draw, device=device) * inputs**-0.5
        V = torch.randn(inputs, low, generator=draw, device=device)
        G = Q @ Q.mT

        def gram(Q: Tensor = Q, V: Tensor = V) -> Tensor:
            return V - (Q @ Q.mT) @ V

        def factored(Q: Tensor = Q, V: Tensor = V) -> Tensor:
            return project(V, Q)

        def cached(G: Tensor = G, V: Tensor = V) -> Tensor:
            return V - G @ V

        worst = max(float((one() - factored()).abs().max() / V.abs().max()) for one in (gram, cached))
        sides = {"factored": factored, "gram": gram, "cached": cached}
        found = context.alternate(sides, warm_up=3, rounds=20, keep=2)
        case = f"{name}: {outputs} × {inputs}, V {inputs} × {low}, Q {inputs} × {rank - low}, float32"
        for other in ("gram", "cached"):
            yield Figure(
                figure=f"projecting V, factored / {other}", case=case, ours=found["factored"].seconds,
                peer=found[other].seconds, unit="s", at_most=1.05 if other == "gram" else None,
            )  # fmt: skip
        yield Figure(figure="projecting V: largest difference of the forms", case=case, ours=worst, at_most=1e-4)
        yield Figure(figure="projecting V: memory of a cached G", case=case, ours=4 * inputs**2 / GIB, unit="GiB")
