"""What ranks that share rows of tokens do on one card: messages in 8 bits, and attention over packed documents."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.record import Figure

REPEATS = 10  # one call is too short to be timed


def codecs(context: Context) -> Iterator[Figure]:
    """Bytes read and written while a block is coded, or decoded, a second, next to those of a copy."""
    from treering.techniques.ulysses.codec import codec

    sizes, device = context.sizes, context.device.torch_device
    shape = (sizes.attention_tokens, sizes.key_heads, sizes.head_width)
    block = torch.randn(shape, device=device).bfloat16()
    copy = torch.empty_like(block)

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(REPEATS):
                call()

        return run

    for name in ("int8", "e4m3"):
        rows = codec(name)
        assert rows is not None
        message = rows.encode(block)
        moved = block.numel() * block.element_size() + message.numel()
        sides = {
            "encode": repeated(lambda rows=rows, message=message: rows.encode(block, out=message)),  # type: ignore[misc]
            "decode": repeated(lambda rows=rows, message=message: rows.decode(message, *shape, torch.bfloat16)),  # type: ignore[misc]
            "copy": repeated(lambda: copy.copy_(block)),
        }
        found = context.alternate(sides, warm_up=2, keep=3)
        plain = 2 * block.numel() * block.element_size()
        peers = [REPEATS * plain / GIB / seconds for seconds in found["copy"].seconds]
        for side in ("encode", "decode"):
            rates = [REPEATS * moved / GIB / seconds for seconds in found[side].seconds]
            case = f"{name}; {shape[0]} tokens, {shape[1]} heads of {shape[2]}"
            yield Figure(figure=f"rate of {side} / of a copy", case=case, ours=rates, peer=peers, unit="GiB/s")


def packed(context: Context) -> Iterator[Figure]:
    """Attention over packed documents next to torch's with a dense mask of blocks, forward and backward."""
    from treering.attention import Documents, attend

    device, sizes = context.device.torch_device, context.sizes
    each = sizes.attention_tokens // 8
    tokens, lengths = 8 * each, [each] * 8
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, sizes.head_width, generator=draw, device=device).bfloat16().requires_grad_()
        for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)
    )
    incoming = torch.randn_like(query)
    documents = Documents.of(lengths, device)
    number = torch.arange(8, device=device).repeat_interleave(each)
    mask = (number[:, None] == number[None]).tril()

    def ours() -> None:
        torch.autograd.grad(attend(query, key, value, documents), (query, key, value), incoming)

    def dense() -> None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        torch.autograd.grad(out, (query, key, value), incoming)

    found = context.alternate({"packed": ours, "dense": dense}, warm_up=1, keep=3)
    yield Figure(
        figure="packed attention / torch's with a dense mask", case=f"8 documents of {each} tokens",
        ours=found["packed"].seconds, peer=found["dense"].seconds, unit="s", at_most=1.0,
    )  # fmt: skip
