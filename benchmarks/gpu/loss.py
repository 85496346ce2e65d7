"""Head and cross-entropy in tiles, next to the plain form and Liger's fused one where it is installed."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.device import Context, Measured
from benchmarks.gpu.record import Figure

LIGER = "liger_kernel"
SLOWER = 1.05  # than the plain loss, with the longest tiles


def rows(context: Context) -> Iterator[Figure]:
    sizes = context.sizes
    for family, vocabulary in sizes.vocabularies.items():
        context.device.free()
        case = f"{sizes.loss_tokens} tokens, width {sizes.hidden}, vocabulary {vocabulary} ({family}), bfloat16"
        sides = _sides(context, vocabulary)
        yield from _differences(sides, case)
        found = context.alternate({name: side.run for name, side in sides.items()}, warm_up=2, keep=3)
        yield from _compared(sizes.loss_tiles, found, case)


class Side:
    """One way to compute the loss; `run` computes it and its gradients."""

    def __init__(self, loss: Callable[[], Tensor], leaves: list[Tensor]):
        self.loss, self.leaves = loss, leaves

    def run(self) -> list[Tensor]:
        loss = self.loss()
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves)]


def _sides(context: Context, vocabulary: int) -> dict[str, Side]:
    from treering.techniques.tiling.losses import OutputHead, TiledHead

    sizes, device = context.sizes, context.device.torch_device
    draw = torch.Generator(device).manual_seed(0)
    head: Any = nn.Linear(sizes.hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.normal_(0, 0.02, generator=draw)
    hidden = torch.randn(sizes.loss_tokens, sizes.hidden, generator=draw, device=device).to(torch.bfloat16)
    hidden.requires_grad_()
    targets = torch.randint(vocabulary, (sizes.loss_tokens,), generator=draw, device=device)
    leaves = [hidden, head.weight]
    tiled = TiledHead(OutputHead(module=head))

    def plain() -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum") / sizes.loss_tokens

    def in_tiles(size: int) -> Callable[[], Tensor]:
        return lambda: tiled.cross_entropy(hidden, targets, size=size) / sizes.loss_tokens

    sides = {"plain": Side(plain, leaves)}
    sides |= {_called(size): Side(in_tiles(size), leaves) for size in sizes.loss_tiles}
    if find_spec(LIGER) and not context.dry:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        sides[LIGER] = Side(lambda: fused(head.weight, hidden, targets) / sizes.loss_tokens, leaves)
    return sides


def _called(size: int) -> str:
    return f"tiles of {size}"


def _differences(sides: dict[str, Side], case: str) -> Iterator[Figure]:
    """Of loss and gradients, relative to the largest element: a faster loss that is another one is of no interest."""
    wanted = sides["plain"].run()
    for name in [name for name in sides if name != "plain"]:
        found = sides[name].run()
        worst = max(
            float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for a, b in zip(found, wanted, strict=True)
        )
        yield Figure(figure="difference from the plain loss", case=f"{name}; {case}", ours=worst, at_most=0.03)


def _compared(tiles: tuple[int, ...], found: dict[str, Measured], case: str) -> Iterator[Figure]:
    for size in tiles:
        ours = found[_called(size)]
        for peer in ("plain", LIGER):
            if peer not in found:
                continue
            longest = peer == "plain" and size == max(tiles)
            yield Figure(
                figure=f"tiled loss / {peer} loss, time", case=f"{_called(size)}; {case}", ours=ours.seconds,
                peer=found[peer].seconds, unit="s", at_most=SLOWER if longest else None,
            )  # fmt: skip
            yield Figure(
                figure=f"tiled loss / {peer} loss, peak above the start", case=f"{_called(size)}; {case}",
                ours=ours.gib, peer=found[peer].gib, unit="GiB",
            )  # fmt: skip
