"""Queries, keys and values with outliers, and the attention whose output and gradients codecs are compared on.

Shapes: H heads, S tokens, D width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Code = Callable[[Tensor], Tensor]  # x [S, H, D] -> what it decodes to


def outliers(kind: str, *, tokens: int = 256, heads: int = 4, width: int = 64, seed: int = 0) -> list[Tensor]:
    """Return query, key, value and the gradient of the output, each H × S × D in float64.

    gauss     normally distributed, and keys that match some later query
    channels  constant offsets of 7 to 15 deviations in channels of keys and queries, values with 6 times larger ones
    tokens    channels, a first token that all attend to, rows of values 20 times and of queries 8 times larger
    """
    draw = torch.Generator().manual_seed(seed)
    query, key, value, incoming = (
        torch.randn(heads, tokens, width, generator=draw, dtype=torch.float64) for _ in range(4)
    )
    matches = torch.randperm(tokens, generator=draw)
    key[:, matches[: tokens // 4]] += 0.7 * query[:, matches[tokens // 4 : tokens // 2]]
    if kind in ("channels", "tokens"):
        chosen = torch.randperm(width, generator=draw)
        key[..., chosen[:4]] += 7 + 8 * torch.rand(heads, 1, 4, generator=draw, dtype=torch.float64)
        query[..., chosen[2:5]] += 7 * torch.rand(heads, 1, 3, generator=draw, dtype=torch.float64)
        value[..., chosen[5:9]] *= 6
        query, key = rotary(query), rotary(key)
    if kind == "tokens":
        key[:, 0] += 0.5 * query.mean(1)
        rows = torch.randperm(tokens, generator=draw)
        value[:, rows[: tokens // 64]] *= 20
        query[:, rows[-tokens // 64 :]] *= 8
    return [query, key, value, incoming]


def rotary(x_HSD: Tensor, base: float = 10000.0) -> Tensor:
    """Return x with its position in its phase, as models rotate queries and keys."""
    half = x_HSD.shape[-1] // 2
    angle = torch.arange(x_HSD.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
    low, high = x_HSD[..., :half], x_HSD[..., half:]
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)


def by_shard(code: Code, x_HSD: Tensor, shards: int = 4) -> Tensor:
    """Return what `code` makes of H × S × D, applied to the tokens of each of `shards` ranks by themselves."""
    pieces = [code(piece) for piece in x_HSD.transpose(0, 1).tensor_split(shards)]
    return torch.cat(pieces).transpose(0, 1).to(x_HSD.dtype)


def errors(
    given: list[Tensor], forward: list[Code | None], backward: Code | None = None, *, scaling: float | None = None,
    shards: int = 4,
) -> dict[str, float]:  # fmt: skip
    """Return the relative errors of causal attention's output and gradients, against those without a codec.

    Args:
        given: query, key, value and the gradient of the output; keys and values may have fewer heads.
        forward: the codecs of query, key, value and, fourth, of the output; None where it is sent as it is.
        backward: the codec of every gradient, that of the output as well as those of query, key and value.
    """

    def through(code: Code | None, x: Tensor) -> Tensor:
        return x if code is None else by_shard(code, x, shards)

    def attention(query: Tensor, key: Tensor, value: Tensor, incoming: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = F.scaled_dot_product_attention(
            *(x[None] for x in leaves), is_causal=True, scale=scaling, enable_gqa=len(query) != len(key)
        )[0]
        return (out.detach(), *torch.autograd.grad(out, leaves, incoming))

    wanted = attention(*given)
    coded = [through(code, x) for code, x in zip(forward, given[:3])]
    out, *gradients = attention(*coded, through(backward, given[3]))
    out = through(forward[3] if len(forward) > 3 else None, out)
    found = (out, *(through(backward, x) for x in gradients))
    return {
        name: float((a - b).norm() / b.norm())
        for name, a, b in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True)
    }
