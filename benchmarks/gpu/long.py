"""What was reasoned for a card about long sequences: sums in products, results that are not computed, waits, copies."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.models import batch, build, forward_backward
from benchmarks.gpu.record import Figure

BAR = 1.0  # what replaces something is no slower


def sums(context: Context) -> Iterator[Figure]:
    """The float32 sum of a head's gradient: added inside the product next to made, then added."""
    from treering.techniques.tiling.tile_job import Gradient

    sizes, device = context.sizes, context.device.torch_device
    for family, vocabulary in sizes.vocabularies.items():
        context.device.free()
        head = torch.empty(vocabulary, sizes.hidden, dtype=torch.bfloat16, device=device)
        for size in sizes.loss_tiles:
            g = torch.randn(size, vocabulary, device=device).to(torch.bfloat16)
            x = torch.randn(size, sizes.hidden, device=device).to(torch.bfloat16)
            inside, behind = (Gradient(head, cut=False, tiles=9, wide=True) for _ in range(2))

            def added(total: Gradient = behind, g: Tensor = g, x: Tensor = x) -> None:
                total.add(g.t() @ x, 0, 0)

            def in_product(total: Gradient = inside, g: Tensor = g, x: Tensor = x) -> None:
                total.add_product(g, x)

            case = f"tile of {size}, width {sizes.hidden}, vocabulary {vocabulary} ({family}), bfloat16"
            once = Gradient(head, cut=False, tiles=9, wide=True)
            for _ in range(2):
                once.add_product(g, x)
            wanted = 2 * (g[:, :64].t().float() @ x.float())
            assert once.value is not None
            worst = float((once.value[:64] - wanted).abs().max() / wanted.abs().max())
            yield Figure(figure="gradient of a head added in its product, error", case=case, ours=worst, at_most=0.01)
            del once, wanted
            found = context.alternate({"inside": in_product, "behind": added}, warm_up=2, keep=2)
            yield Figure(
                figure="gradient of a head added in its product / after it, time", case=case,
                ours=found["inside"].seconds, peer=found["behind"].seconds, unit="s", at_most=BAR,
            )  # fmt: skip
            yield Figure(
                figure="gradient of a head added in its product / after it, memory above the sum", case=case,
                ours=found["inside"].gib, peer=found["behind"].gib, unit="GiB",
            )  # fmt: skip


class _SwiGLU(nn.Module):
    def __init__(self, hidden: int, inner: int, **how: Any):
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner, bias=False, **how), nn.Linear(hidden, inner, bias=False, **how)
        self.down = nn.Linear(inner, hidden, bias=False, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def unread(context: Context) -> Iterator[Figure]:
    """Forward and backward in tiles: results that nothing reads left out next to computed."""
    from treering.techniques.tiling.tile import TiledRegion

    sizes = context.sizes
    how: dict[str, Any] = {"device": context.device.torch_device, "dtype": torch.bfloat16}
    keys = sizes.hidden * sizes.key_heads // sizes.heads
    parts = {
        "an MLP": _SwiGLU(sizes.hidden, sizes.inner, **how),
        "norm and q, k, v": nn.Sequential(
            nn.RMSNorm(sizes.hidden, **how), nn.Linear(sizes.hidden, sizes.hidden + 2 * keys, bias=False, **how)
        ),
    }
    for name, part in parts.items():
        x = torch.randn(sizes.memory_tokens, sizes.hidden, device=how["device"]).to(how["dtype"]).requires_grad_()
        sides = {side: TiledRegion(name, [part], "tiledblock") for side in ("left out", "computed")}
        size = max(1, sizes.memory_tokens // 4)

        def step(region: TiledRegion, part: nn.Module = part, x: Tensor = x, size: int = size) -> None:
            region(part, x, size=size).sum().backward()

        for region in sides.values():
            step(region)  # its first call is checked
        if not sides["left out"].check.unread:
            raise AssertionError(f"every result of {name} was found to be read")
        sides["computed"].check.unread = frozenset()
        calls: dict[str, Callable[[], None]] = {side: (lambda r=region: step(r)) for side, region in sides.items()}
        found = context.alternate(calls, warm_up=2, keep=2)
        yield Figure(
            figure="tiles without results that nothing reads / with them, time",
            case=f"{name}, {sizes.memory_tokens} tokens in tiles of {size}, bfloat16, forward and backward",
            ours=found["left out"].seconds, peer=found["computed"].seconds, unit="s", at_most=BAR,
        )  # fmt: skip


def waits(context: Context) -> Iterator[Figure]:
    """Seconds until the host has put a forward into the queue, behind a backward that still runs."""
    import treering as tr
    from treering.objectives.trained import TRAINED

    sizes = context.sizes
    run = build(context, sizes.config(sizes.few), [tr.LoRA(rank=8, dtype="base"), tr.Recompute(), tr.TiledLoss()])
    data = batch(context, sizes.memory_tokens)
    host = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in data.items()}
    (ready,) = run.ready([host])
    forward_backward(run, data)
    seconds: dict[str, list[float]] = {"found on the host": [], "asked of the device": []}
    for _ in range(sizes.rounds):
        for name, found in seconds.items():
            given = ready if name == "found on the host" else {k: v for k, v in ready.items() if k != TRAINED}
            run.loss(ready).backward()
            began = time.perf_counter()
            loss = run.loss(given)
            found.append(time.perf_counter() - began)
            loss.backward()
            context.device.synchronize()
    yield Figure(
        figure="host time of a forward behind a backward, trained positions from the host / from the device",
        case=f"{sizes.few} layers, {sizes.memory_tokens} tokens", ours=seconds["found on the host"],
        peer=seconds["asked of the device"], unit="s", at_most=BAR,
    )  # fmt: skip


def pinned(context: Context) -> Iterator[Figure]:
    """Host memory of a forward's block inputs: allocated for all blocks at once next to a piece at a time."""
    from treering.techniques.recompute.copies import HostPool

    sizes = context.sizes
    each, blocks = 2 * sizes.offload_tokens * sizes.hidden, 2 * sizes.few - 1
    seconds: dict[str, list[float]] = {"at once": [], "in pieces": []}
    for _ in range(min(2, sizes.rounds)):
        for name, found in seconds.items():
            pool = HostPool(pinned=not context.dry)
            began = time.perf_counter()
            if name == "at once":
                pool.reserve(each, blocks)
            taken = [pool.take(each) for _ in range(blocks)]
            found.append(time.perf_counter() - began)
            if hasattr(torch.accelerator, "empty_host_cache") and not context.dry:
                del taken, pool
                torch.accelerator.empty_host_cache()
    yield Figure(
        figure="pinned memory of block inputs, allocated at once / in pieces", case=f"{blocks} of {each / GIB:.3g} GiB",
        ours=seconds["at once"], peer=seconds["in pieces"], unit="s", at_most=BAR,
    )  # fmt: skip


def prefetch(context: Context) -> Iterator[Figure]:
    """Forward and backward with block inputs in host memory, of which one or more come back ahead."""
    import treering as tr

    sizes = context.sizes
    config, data = sizes.config(sizes.few), batch(context, sizes.offload_tokens, sizes.offload_document)
    common = [tr.Full(train=("*_proj.weight", "*norm*")), tr.TiledLoss()]
    sides = {
        number: build(context, config, [*common, tr.Recompute(offload="cpu", prefetch=number)]) for number in (1, 2, 3)
    }
    calls = {str(number): (lambda run=run: forward_backward(run, data)) for number, run in sides.items()}
    found = context.alternate(calls, warm_up=1, keep=2)
    for number in ("2", "3"):
        case = f"{number} ahead; {sizes.few} layers, {sizes.offload_tokens} tokens, bfloat16"
        yield Figure(
            figure="block inputs copied back ahead, several / one, time", case=case, ours=found[number].seconds,
            peer=found["1"].seconds, unit="s",
        )  # fmt: skip
        yield Figure(
            figure="block inputs copied back ahead, several / one, peak above the start", case=case,
            ours=found[number].gib, peer=found["1"].gib, unit="GiB",
        )  # fmt: skip
