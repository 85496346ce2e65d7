"""Whole training steps: how many tokens a second with LoRA, and what OSFT adds to full fine-tuning."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.device import GIB, Context, median
from benchmarks.gpu.models import adamw, batch, build, forward_backward, gradients, stepper
from benchmarks.gpu.record import Figure

PUBLISHED = 12473.0  # tokens a second, an 8B model with LoRA on one H100, 4096 tokens a step


def lora(context: Context) -> Iterator[Figure]:
    """The fastest that fits comes first: without recompute; each tiled loss keeps the logits away."""
    import treering as tr

    sizes, device = context.sizes, context.device
    adapter = tr.LoRA(dtype="base")
    data = batch(context, sizes.lora_tokens)
    for name, more in (
        ("tiled loss", [tr.TiledLoss()]),
        ("recompute and tiled loss", [tr.Recompute(), tr.TiledLoss()]),
        ("blocks compiled, tiled loss", [_compile(context), tr.TiledLoss()]),
    ):
        device.free()
        if context.left() < 10:
            raise TimeoutError(f"no time was left for {name}")
        case = (
            f"{sizes.layers} layers, bfloat16, rank {adapter.rank} on every linear, {sizes.lora_tokens} tokens; {name}"
        )
        try:
            run = build(context, sizes.config(sizes.layers), [adapter, *more])
            found = context.alternate({"step": stepper(run, adamw(run), data)}, warm_up=3, keep=10)["step"]
        except Exception as error:
            if not device.out_of_memory(error):
                raise
            yield Figure(figure="tokens per second with LoRA (0: out of memory)", case=case, ours=0, unit="tokens/s")
            continue
        finally:
            run = None
        rates = [sizes.lora_tokens / seconds for seconds in found.seconds]
        yield Figure(
            figure="tokens per second with LoRA / published", case=case, ours=rates, peer=PUBLISHED, unit="tokens/s",
            at_least=1.0,
        )  # fmt: skip
        yield Figure(figure="peak above the step's start, with LoRA", case=case, ours=found.gib, unit="GiB")


def _compile(context: Context) -> Any:
    import treering as tr

    return tr.Compile(backend="aot_eager") if context.dry else tr.Compile()  # inductor takes half a minute on a CPU


def compiled(context: Context) -> Iterator[Figure]:
    """Blocks compiled by inductor next to the same blocks as they are, and how far the gradients differ."""
    import treering as tr

    sizes = context.sizes
    data = batch(context, sizes.lora_tokens)
    runs = {
        name: build(context, sizes.config(sizes.few), [tr.Full(), tr.TiledLoss(), *more])
        for name, more in (("plain", []), ("compiled", [_compile(context)]))
    }
    found = {name: gradients(run, data) for name, run in runs.items()}
    case = f"{sizes.few} layers, bfloat16, every weight trained, {sizes.lora_tokens} tokens, tiled loss"
    worst = max(
        float((found["compiled"][name].float() - wanted.float()).norm() / wanted.float().norm())
        for name, wanted in found["plain"].items()
    )
    found.clear()
    yield Figure(figure="largest relative difference of a gradient, compiled", case=case, ours=worst, at_most=0.05)
    sides = {name: (lambda run=run: forward_backward(run, data)) for name, run in runs.items()}
    times = context.alternate(sides, warm_up=2, keep=2)
    yield Figure(
        figure="forward and backward, blocks compiled / not", case=case, ours=times["compiled"].seconds,
        peer=times["plain"].seconds, unit="s", at_most=1.0,
    )  # fmt: skip
    yield Figure(
        figure="peak above the start, blocks compiled / not", case=case, ours=times["compiled"].gib,
        peer=times["plain"].gib, unit="GiB",
    )  # fmt: skip


def osft(context: Context) -> Iterator[Figure]:
    """A step of three forms next to the same step of the same weights with nothing protected.

    Both sides of `update` are one model: full fine-tuning of the linears is the run without what it does around a step.
    The forms that train coefficients in place of the weights have a model of full fine-tuning next to them.
    """
    import treering as tr

    yield from _beside_full(context, tr.OSFT(), "the default", rest=0.6)
    context.device.free()
    yield from _beside_full(context, tr.OSFT(form="update"), "update", rest=0.3)
    context.device.free()
    yield from _beside_full(context, tr.OSFT(form="one_sided", ratio=0.5), "one_sided, half free", rest=0.0)


def _beside_full(context: Context, technique: Any, name: str, rest: float) -> Iterator[Figure]:
    """`rest`: the share of the row's time that is kept for what comes after."""
    import treering as tr
    from treering.plan import Run

    sizes = context.sizes
    until = context.left() * rest
    more = [tr.TiledLoss(), tr.Shard(compute="bfloat16")]
    run = build(context, sizes.config(sizes.few), [technique, *more], dtype=torch.float32)
    optimizer = adamw(run)
    if technique.form == "update":
        bare = tuple(replace(one, gradients=None, before_step=None, after_step=None) for one in run.plan.applied)
        full, other = Run(replace(run.plan, applied=bare), lost={}), optimizer
    else:
        linears = tr.Full(train=("*_proj.weight",))
        full = build(context, sizes.config(sizes.few), [linears, *more], dtype=torch.float32)
        other = adamw(full)
    for number, tokens in enumerate(sizes.osft_tokens):
        data = batch(context, tokens)
        sides = {"osft": stepper(run, optimizer, data), "full": stepper(full, other, data)}
        later = (len(sizes.osft_tokens) - 1 - number) * 0.5 * (context.left() - until)
        found = context.alternate(sides, warm_up=2, keep=3 + until + later)
        case = f"{name}; {sizes.few} layers, float32 weights, bfloat16 arithmetic, {tokens} tokens"
        yield Figure(
            figure="step of OSFT / of full fine-tuning", case=case, ours=found["osft"].seconds,
            peer=found["full"].seconds, unit="s",
        )  # fmt: skip
        added = median(found["osft"].seconds) - median(found["full"].seconds)
        yield Figure(figure="what OSFT adds to a step", case=case, ours=added, unit="s")
        yield Figure(
            figure="peak above the step's start, OSFT / full", case=case, ours=found["osft"].gib,
            peer=found["full"].gib, unit="GiB",
        )  # fmt: skip
    yield Figure(
        figure="memory of protected directions", case=f"{name}; {sizes.few} layers", ours=_kept(run), unit="GiB"
    )


def _kept(run: Any) -> float:
    from treering.core.sharded import local

    own = {name for applied in run.plan.applied for part in applied.parts.values() for name in part.names}
    own -= {name for name, _ in run.trainable()}
    named = [*run.model.named_buffers(), *run.model.named_parameters()]
    tensors = [local(tensor) for name, tensor in named if name in own]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB
