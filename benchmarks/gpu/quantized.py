"""LoRA on packed weights: a step in each number format next to one on plain weights, and a whole 8B shape in NF4."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.models import adamw, batch, build, stepper
from benchmarks.gpu.record import Figure

FORMATS = ("nf4", "nvfp4", "mxfp4", "int4", "int8", "fp8", "fp8_block")


def formats(context: Context) -> Iterator[Figure]:
    """Each format next to plain bfloat16 weights, in turn; the models of a few layers are on the device together."""
    sizes = context.sizes
    data = batch(context, sizes.lora_tokens)
    sides: dict[str, Callable[[], None]] = {}
    held: dict[str, float] = {}
    for name in ("plain", *FORMATS):
        run = _run(context, sizes.few, name)
        held[name] = sum(p.numel() * p.element_size() for p in run.model.parameters()) / GIB
        sides[name] = stepper(run, adamw(run), data)
    found = context.alternate(sides, warm_up=1, keep=3)
    case = f"{sizes.few} layers, {sizes.lora_tokens} tokens, rank 16 on every linear, recompute and tiled loss"
    for name in FORMATS:
        yield Figure(
            figure=f"step of LoRA on {name} / on bfloat16", case=case, ours=found[name].seconds,
            peer=found["plain"].seconds, unit="s",
        )  # fmt: skip
        yield Figure(
            figure=f"weights in {name} / in bfloat16, with embedding and head", case=case, ours=held[name],
            peer=held["plain"], unit="GiB",
        )  # fmt: skip
        yield Figure(
            figure=f"peak above the step's start, {name} / bfloat16", case=case, ours=found[name].gib,
            peer=found["plain"].gib, unit="GiB",
        )  # fmt: skip


def decode(context: Context) -> Iterator[Figure]:
    """Bytes read and written while a packed matrix becomes bfloat16, a second, next to those of a copy."""
    from treering.formats import named

    sizes, device = context.sizes, context.device.torch_device
    shape = sizes.matrices["gate and up"]
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16)
    copy, repeats = torch.empty_like(weight), 10  # one call is too short to be timed
    for name in FORMATS:
        form = named(name)
        tensors = form.encode(weight)
        moved = sum(t.numel() for t in tensors.values()) + weight.numel() * weight.element_size()

        def unpack(form: Any = form, tensors: Any = tensors) -> None:
            for _ in range(repeats):
                form.decode(tensors, shape[1], torch.bfloat16)

        def plain() -> None:
            for _ in range(repeats):
                copy.copy_(weight)

        found = context.alternate({"decode": unpack, "copy": plain}, keep=1)
        rates = [repeats * moved / GIB / seconds for seconds in found["decode"].seconds]
        copied = 2 * weight.numel() * weight.element_size()
        peers = [repeats * copied / GIB / seconds for seconds in found["copy"].seconds]
        case = f"{name}; {shape[0]} × {shape[1]} to bfloat16"
        yield Figure(figure="rate of decoding / of a copy", case=case, ours=rates, peer=peers, unit="GiB/s")


def whole(context: Context) -> Iterator[Figure]:
    sizes, device = context.sizes, context.device
    device.free()
    run = _run(context, sizes.layers, "nf4")
    held = device.allocated()
    step = stepper(run, adamw(run), batch(context, sizes.lora_tokens))
    found = context.alternate({"step": step}, warm_up=2, keep=2)["step"]
    case = (
        f"{sizes.layers} layers in nf4, rank 16 on every linear, {sizes.lora_tokens} tokens, recompute and tiled loss"
    )
    rates = [sizes.lora_tokens / seconds for seconds in found.seconds]
    yield Figure(figure="tokens per second of QLoRA", case=case, ours=rates, unit="tokens/s")
    peaks = [] if held is None else [held / GIB + gib for gib in found.gib]
    yield Figure(figure="peak of QLoRA, weights included", case=case, ours=peaks, unit="GiB")


def _run(context: Context, layers: int, name: str) -> Any:
    import treering as tr

    adapter = tr.LoRA(dtype="bfloat16")
    packed = [] if name == "plain" else [tr.Quantize(format=name)]
    techniques = [*packed, adapter, tr.Recompute(), tr.TiledLoss()]
    return build(context, context.sizes.config(layers), techniques, dtype=torch.bfloat16)
