"""The longest sequence that one card trains an 8B shape on, with everything that saves memory.

With offloaded inputs a block's memory is used again by the next, so that the peak does not depend on the depth: a few
layers are run, and the weights of the others are held as one tensor. What that leaves out is host memory, which is
tokens × width × 2 bytes for each of 31 blocks and is reported beside it.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.models import batch, build, forward_backward
from benchmarks.gpu.record import Figure

USABLE = 0.97  # of the card's memory: the rest has the CUDA context, libraries and what the allocator cannot use


def rows(context: Context) -> Iterator[Figure]:
    import treering as tr

    sizes = context.sizes
    # Of three blocks, one input that leaves is enough for the peak of a deep model: while a block runs backward, its
    # own input and the one before are on the device. More would only pin more host memory, which takes seconds.
    offload = tr.Recompute(offload="cpu", first_blocks=1)
    techniques = [tr.LoRA(dtype="base"), tr.TiledBlock(), tr.TiledLoss(), offload]
    run = build(context, sizes.config(sizes.longest_layers), techniques)
    weights = _other_layers(context, run)
    best, worst = _search(context, run)
    held = weights.numel() / GIB
    case = (
        f"LoRA, tiled block and loss, recompute with offload; {sizes.longest_layers} of {sizes.layers} layers run, "
        f"{held:.1f} GiB for the weights of the others; documents of {sizes.longest_document}, the last "
        f"{sizes.longest_trained} tokens trained; {'limit ' + str(worst) if worst else 'no limit found in time'}"
    )
    yield Figure(figure="longest sequence that was trained on", case=case, ours=best, unit="tokens")
    host = best * sizes.hidden * 2 * (sizes.layers - 1) / GIB
    yield Figure(figure="host memory that so many tokens take at full depth", case="computed", ours=host, unit="GiB")


def _other_layers(context: Context, run: Any) -> torch.Tensor:
    """Bytes of the layers that are not run."""
    layers = run.model.model.layers
    one = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    count = max(context.sizes.layers - len(layers), 0) * one
    return torch.empty(count, dtype=torch.uint8, device=context.device.torch_device)


def _search(context: Context, run: Any) -> tuple[int, int | None]:
    """Return the longest that was trained on, and the shortest that did not fit, if there was time to find one."""
    sizes = context.sizes
    tried: list[tuple[int, int | None]] = []  # tokens that fit, and the peak
    worst, tokens, took = None, sizes.longest_start, 0.0
    while tokens is not None and tokens <= sizes.longest_most:
        best = tried[-1][0] if tried else 0
        if best and context.left() < 1.2 * took * tokens / best + 1:
            break
        fits, seconds = _fits(context, run, tokens)
        if fits:
            took = seconds
            tried.append((tokens, context.device.peak()))
        else:
            worst = tokens
        tokens = following(tried, worst, capacity=context.device.capacity(), step=sizes.longest_step)
    return tried[-1][0] if tried else 0, worst


def following(tried: list[tuple[int, int | None]], worst: int | None, *, capacity: int | None, step: int) -> int | None:
    """Return how many tokens to try next; None where the limit is known to within `step`.

    Twice as many at first; from two peaks on, as many as should just fit, for memory is linear in the tokens; and the
    middle between what fits and what does not.
    """
    best = tried[-1][0] if tried else 0
    if worst is not None:
        middle = (best + worst) // 2 // step * step
        return None if worst - best <= step or middle <= best else middle
    if len(tried) >= 2 and capacity is not None:
        (a, low), (b, high) = tried[-2:]
        if low is not None and high is not None and high > low:
            just = b + int((USABLE * capacity - high) * (b - a) / (high - low))
            return max(just // step * step, b + max(2 * step, b // 16 // step * step))
    return 2 * best


def _fits(context: Context, run: Any, tokens: int) -> tuple[bool, float]:
    """Whether a forward and a backward of so many tokens end, and the seconds that they took."""
    sizes, device = context.sizes, context.device
    try:
        if context.dry and tokens > sizes.longest_pretended:
            raise torch.OutOfMemoryError("a dry run pretends that no more fits")
        data = batch(context, tokens, sizes.longest_document, sizes.longest_trained)
        seconds, _ = context.time(lambda: forward_backward(run, data))
        return True, seconds
    except Exception as error:
        if not device.out_of_memory(error):
            raise
    finally:
        data = None
    for _, parameter in run.trainable():
        parameter.grad = None
    device.free()
    return False, 0.0
