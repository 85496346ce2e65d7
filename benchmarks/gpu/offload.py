"""Block inputs that wait in host memory between forward and backward: equal gradients, and the time that it costs."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.device import GIB, Context, deterministic
from benchmarks.gpu.models import batch, build, forward_backward, gradients
from benchmarks.gpu.record import Figure

BAR = 1.03  # of the step without offload


def rows(context: Context) -> Iterator[Figure]:
    yield from _equal_bits(context)
    context.device.free()
    yield from _cost(context)


def _equal_bits(context: Context) -> Iterator[Figure]:
    """Elements of all gradients that differ between a run that offloads and one that does not."""
    import treering as tr

    sizes = context.sizes
    config = sizes.config(sizes.few)
    data = batch(context, sizes.bitwise_tokens, sizes.bitwise_tokens // 4)
    common = [tr.Full(train=("*_proj.weight", "*norm*")), tr.TiledLoss()]
    with deterministic():
        wanted = gradients(build(context, config, [*common, tr.Recompute()]), data)
        again = gradients(build(context, config, [*common, tr.Recompute()]), data)
        found = gradients(build(context, config, [*common, tr.Recompute(offload="cpu")]), data)
    noise = sum(int((again[name] != value).sum()) for name, value in wanted.items())
    differ = sum(int((found[name] != value).sum()) for name, value in wanted.items())
    if found.keys() != wanted.keys() or not wanted:
        raise AssertionError("the two runs have gradients of different parameters")
    case = f"{sizes.few} layers, bfloat16, {sizes.bitwise_tokens} tokens"
    yield Figure(figure="gradient elements that differ with offload", case=case, ours=differ, at_most=0)
    yield Figure(figure="gradient elements that differ without it, computed twice", case=case, ours=noise, at_most=0)


def _cost(context: Context) -> Iterator[Figure]:
    """Forward and backward with offload next to the same without."""
    import treering as tr

    sizes = context.sizes
    config = sizes.config(sizes.few)
    data = batch(context, sizes.offload_tokens, sizes.offload_document)
    common = [tr.Full(train=("*_proj.weight", "*norm*")), tr.TiledLoss()]
    here = build(context, config, [*common, tr.Recompute()])
    away = build(context, config, [*common, tr.Recompute(offload="cpu")])
    sides = {"offload": lambda: forward_backward(away, data), "none": lambda: forward_backward(here, data)}
    found = context.alternate(sides, warm_up=1, rounds=5, keep=2)
    case = (
        f"{sizes.few} layers, {sizes.offload_tokens} tokens in documents of {sizes.offload_document}, bfloat16, "
        "forward and backward, tiled loss"
    )
    yield Figure(
        figure="step with offloaded block inputs / without", case=case, ours=found["offload"].seconds,
        peer=found["none"].seconds, unit="s", at_most=BAR,
    )  # fmt: skip
    yield Figure(
        figure="peak above the step's start with offload / without", case=case, ours=found["offload"].gib,
        peer=found["none"].gib, unit="GiB",
    )  # fmt: skip
    yield Figure(
        figure="pinned host memory of offloaded inputs", case=case, ours=away.metrics()["offloaded_gib"], unit="GiB"
    )
    yield from _copy_rate(context)


def _copy_rate(context: Context) -> Iterator[Figure]:
    """What the link to the host allows: without it, no overlap can be judged."""
    device = context.device.torch_device
    size = GIB if not context.toy else 1 << 16
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not context.dry)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    sides = {
        "to the host": lambda: host.copy_(there, non_blocking=True),
        "to the device": lambda: there.copy_(host, non_blocking=True),
    }
    found = context.alternate(sides, warm_up=1, rounds=3)
    for name, one in found.items():
        rates = [size / GIB / seconds for seconds in one.seconds]
        yield Figure(figure="copies of pinned memory", case=name, ours=rates, unit="GiB/s")
