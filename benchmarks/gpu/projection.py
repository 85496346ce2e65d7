"""Projecting V of each matrix of an 8B block, (I − Q Qᵀ) V, in three forms that give the same.

V is M × l and learns, Q is M × h and is protected; h + l = min(N, M), and a quarter of the directions learns.

    gram       G = Q Qᵀ is made, then V − G V        2 M² (h + l) operations a matrix; what mini_trainer does
    factored   V − Q (Qᵀ V)                          4 M h l; ours
    cached     V − G V with a G that is kept         2 M² l, and M² numbers of memory
"""

from collections.abc import Callable, Iterator

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


def products(context: Context) -> Iterator[Figure]:
    """G P of each matrix of an 8B block: time next to float32, and the error next to float64."""
    from treering.core.full_precision import full_precision, product

    device = context.device.torch_device
    for name, (outputs, inputs) in context.sizes.matrices.items():
        draw = torch.Generator(device).manual_seed(0)
        G = torch.randn(outputs, inputs, generator=draw, device=device)
        P = torch.randn(inputs, inputs, generator=draw, device=device) * inputs**-0.5
        some = G[: min(outputs, 512)]
        wanted = some.double() @ P.double()

        def exact(G: Tensor, P: Tensor = P) -> Tensor:
            with full_precision():
                return G @ P

        def split(G: Tensor, P: Tensor = P) -> Tensor:
            return product(G, P)

        def tf32(G: Tensor, P: Tensor = P) -> Tensor:
            return _tf32(lambda: G @ P)

        def tf32_parts(G: Tensor, P: Tensor = P) -> Tensor:
            (Gh, Gl), (Ph, Pl) = _tf32_parts(G), _tf32_parts(P)
            return _tf32(lambda: torch.cat([Gh, Gh, Gl], -1) @ torch.cat([Ph, Pl, Ph], -2))

        ways = {"float32": exact, "bfloat16 × 3": split, "TF32 × 3": tf32_parts, "TF32": tf32}
        sides = {way: (lambda one=one, G=G: one(G)) for way, one in ways.items()}
        found = context.alternate(sides, warm_up=2, rounds=5, keep=1)
        case = f"{name}: {outputs} × {inputs} times {inputs} × {inputs}"
        for way, one in ways.items():
            error = float((one(some).double() - wanted).norm() / wanted.norm())
            yield Figure(figure=f"error of a product, {way}", case=case, ours=error)
            if way != "float32":
                yield Figure(
                    figure=f"time of a product, {way} / float32", case=case, ours=found[way].seconds,
                    peer=found["float32"].seconds, unit="s",
                )  # fmt: skip


def _tf32(multiply: Callable[[], Tensor]) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return multiply()
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32_parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return what TF32 keeps of `t`, ten bits after the leading one, and the rest."""
    high = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return high, t - high
