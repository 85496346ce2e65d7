"""The longest sequence that one card trains an 8B shape on, with everything that saves memory.

With offloaded inputs a block's memory is used again by the next, so that the peak does not depend on the depth: a few
layers are run, and the weights of the others are held as one tensor. What that leaves out is host memory, which is
tokens × width × 2 bytes for each of 31 blocks and is reported next to it.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.models import batch, build, forward_backward
from benchmarks.gpu.record import Figure

USABLE = 0.97  # of the card's memory: the rest has the CUDA context, libraries and what the allocator cannot use


def rows(context: Context) -> Iterator[Figure]:
    """A figure for every length that was trained on, so that a search that is cut off leaves what it found."""
    import treering as tr

    sizes = context.sizes
    # Of three blocks, one input that leaves is enough for the peak of a deep model: while a block runs backward, its
    # own input and the one before are on the device. More would only pin more host memory, which takes seconds.
    offload = tr.Recompute(offload="cpu", first_blocks=1)
    techniques = [tr.LoRA(dtype="base"), tr.TiledBlock(), tr.TiledLoss(), offload]
    run = build(context, sizes.config(sizes.longest_layers), techniques)
    weights = _other_layers(context, run)
    case = (
        f"LoRA, tiled block and loss, recompute with offload; {sizes.longest_layers} of {sizes.layers} layers run, "
        f"{weights.numel() / GIB:.1f} GiB for the weights of the others; documents of {sizes.longest_document}, the "
        f"last {sizes.longest_trained} tokens trained"
    )
    search = Search(context, run)
    for tokens, peak in search:
        at = f"{tokens} tokens in {search.seconds:.1f} s; {case}"
        yield Figure(figure="peak of a step of so many tokens", case=at, ours=peak and peak / GIB, unit="GiB")
    limit = f"limit {search.worst}" if search.worst else "no limit found in time"
    yield Figure(
        figure="longest sequence that was trained on", case=f"{case}; {limit}", ours=search.best, unit="tokens"
    )
    host = search.best * sizes.hidden * 2 * (sizes.layers - 1) / GIB
    yield Figure(figure="host memory that so many tokens take at full depth", case="computed", ours=host, unit="GiB")


def _other_layers(context: Context, run: Any) -> torch.Tensor:
    """Bytes of the layers that are not run."""
    layers = run.model.model.layers
    one = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    count = max(context.sizes.layers - len(layers), 0) * one
    return torch.empty(count, dtype=torch.uint8, device=context.device.torch_device)


class Search:
    """Iterate over (tokens, peak bytes) of steps that end, each longer than the one before."""

    def __init__(self, context: Context, run: Any):
        self.context, self.run = context, run
        self.tried: list[tuple[int, int | None]] = []  # tokens that fit, and the peak
        self.worst: int | None = None  # the shortest that did not fit
        self.seconds = 0.0  # of the last step that ended

    @property
    def best(self) -> int:
        return self.tried[-1][0] if self.tried else 0

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        sizes, device = self.context.sizes, self.context.device
        tokens: int | None = sizes.longest_start
        while tokens is not None and tokens <= sizes.longest_most:
            if self.best and self.context.left() < 1.2 * self.seconds * tokens / self.best + 1:
                return
            if self._fits(tokens):
                self.tried.append((tokens, device.peak()))
                yield self.tried[-1]
            else:
                self.worst = tokens
            tokens = following(self.tried, self.worst, capacity=device.capacity(), step=sizes.longest_step)

    def _fits(self, tokens: int) -> bool:
        """Whether a forward and a backward of so many tokens end."""
        sizes, device = self.context.sizes, self.context.device
        data = None
        try:
            if self.context.toy and tokens > sizes.longest_pretended:
                raise torch.OutOfMemoryError("a toy run pretends that no more fits")
            data = batch(self.context, tokens, sizes.longest_document, sizes.longest_trained)
            self.seconds, _ = self.context.time(lambda: forward_backward(self.run, data))
            return True
        except Exception as error:
            if not device.out_of_memory(error):
                raise
        finally:
            data = None
        for _, parameter in self.run.trainable():
            parameter.grad = None
        device.free()
        return False


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
