"""Packed attention, forward and gradients, against one plain softmax a document in float64.

Errors are relative to the largest element of the reference; each figure is the worst of the output and the gradients of
query, key, value and sinks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Context
from benchmarks.gpu.record import Figure

HALF, SINGLE = torch.bfloat16, torch.float32
BARS = {HALF: 0.02, SINGLE: 1e-5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a layer asks for. `widths`: of query and value, as multiples of the sizes' head width."""

    dtype: torch.dtype = HALF
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    grouped: bool = True
    ranges: bool = False  # queries in an early and a late range of the row only, as ranks that share it have them
    widths: tuple[float, float] = (1.0, 1.0)


CASES = {
    "grouped heads": Case(),
    "as many keys as queries": Case(grouped=False),
    "sliding window": Case(window=True),
    "sinks": Case(sinks=True),
    "sinks and window": Case(sinks=True, window=True),
    "values narrower than queries": Case(widths=(1.5, 1.0)),
    "heads twice as wide": Case(widths=(2.0, 2.0)),
    "heads four times as wide, window": Case(widths=(4.0, 4.0), window=True),
    "softcap and sinks": Case(softcap=True, sinks=True),
    "queries in two ranges": Case(ranges=True),
    "queries in two ranges, sinks and window": Case(ranges=True, sinks=True, window=True),
    "float32": Case(dtype=SINGLE),
    "float32, queries in two ranges": Case(dtype=SINGLE, ranges=True),
    "float32, window and sinks": Case(dtype=SINGLE, window=True, sinks=True),
}
CAPPED = {
    "softcap": Case(softcap=True),
    "softcap and window": Case(softcap=True, window=True),
    "softcap, float32": Case(dtype=SINGLE, softcap=True),
    "softcap, queries in two ranges": Case(softcap=True, ranges=True),
}


def kernels(context: Context) -> Iterator[Figure]:
    yield from _exact(context, CASES)
    yield from _cost_of_sinks(context)
    yield from _peak_in_single_precision(context)


def flex(context: Context) -> Iterator[Figure]:
    """By itself, because its kernels are compiled, which takes time and a C compiler."""
    yield from _exact(context, CAPPED)


def _exact(context: Context, cases: dict[str, Case]) -> Iterator[Figure]:
    for name, case in cases.items():
        if context.left() < 3:
            raise TimeoutError(f"no time was left for {name} and what comes after it")
        found, kernel = error(context, case)
        text = f"{name}: {kernel}, {str(case.dtype).removeprefix('torch.')}"
        yield Figure(
            figure="packed attention and its gradients / float64", case=text, ours=found, at_most=BARS[case.dtype]
        )
        context.device.free()


def error(context: Context, case: Case) -> tuple[float, str]:
    """Return the worst relative error, and the kernel that was chosen."""
    from treering.attention import Documents, attend
    from treering.attention.kernels import Features, choose
    from treering.attention.reference import reference

    device, sizes = context.device.torch_device, context.sizes
    query_width, value_width = (int(share * sizes.head_width) for share in case.widths)
    documents, tokens = Documents.of(sizes.documents, device), sum(sizes.documents)
    keys = sizes.key_heads if case.grouped else sizes.heads
    shapes = [(1, sizes.heads, tokens, query_width), (1, keys, tokens, query_width), (1, keys, tokens, value_width)]
    draw = torch.Generator(device).manual_seed(0)
    # Normally distributed numbers that `dtype` can hold: both sides begin with the same.
    given = [torch.randn(shape, generator=draw, device=device).to(case.dtype) for shape in [*shapes, (sizes.heads,)]]
    incoming = torch.randn(1, sizes.heads, tokens, value_width, generator=draw, device=device).to(case.dtype)
    rule: dict[str, Any] = {
        "scaling": query_width**-0.5,
        "window": sizes.window if case.window else None,
        "softcap": 5.0 if case.softcap else None,
    }
    parts = (range(tokens // 7, tokens // 3), range(2 * tokens // 3, tokens - 1)) if case.ranges else ()
    found, wanted = (
        _with_gradients(function, [x.to(dtype) for x in given], documents, incoming.to(dtype), case.sinks, rule)
        for function, dtype in ((_in_ranges(attend, parts), case.dtype), (_of_ranges(reference, parts), torch.float64))
    )
    worst = max(
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))
        for a, b in zip(found, wanted, strict=True)
    )
    features = Features(
        dtype=case.dtype,
        width=max(query_width, value_width),
        window=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        keys_before=case.ranges,
    )
    return worst, choose(device.type, features)


def _rows(x: Tensor, parts: tuple[range, ...]) -> Tensor:
    return torch.cat([x[:, :, part.start : part.stop] for part in parts], dim=2) if parts else x


def _in_ranges(function: Callable[..., Tensor], parts: tuple[range, ...]) -> Callable[..., Tensor]:
    """Return `function` of the queries of these ranges only."""

    def call(query: Tensor, key: Tensor, value: Tensor, documents: Any, **rule: Any) -> Tensor:
        return function(_rows(query, parts), key, value, documents.with_queries(parts) if parts else documents, **rule)

    return call


def _of_ranges(function: Callable[..., Tensor], parts: tuple[range, ...]) -> Callable[..., Tensor]:
    """Return the result of `function` for these ranges."""
    return lambda *given, **rule: _rows(function(*given, **rule), parts)


def _with_gradients(
    function: Callable[..., Tensor], given: list[Tensor], documents: Any, incoming: Tensor, sinks: bool,
    rule: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    leaves = [x.requires_grad_() for x in (given if sinks else given[:3])]
    out = function(*leaves[:3], documents, **rule, sinks_H=leaves[3] if sinks else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming[:, :, : out.shape[2]])]


def _cost_of_sinks(context: Context) -> Iterator[Figure]:
    """Forward and backward with sinks next to those without."""
    from treering.attention import Documents, attend

    device, sizes = context.device.torch_device, context.sizes
    tokens = sizes.attention_tokens
    documents = Documents.of([tokens // 4] * 4, device)
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, sizes.head_width, generator=draw, device=device).to(HALF).requires_grad_()
        for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)
    )
    sinks_H = torch.randn(sizes.heads, generator=draw, device=device).to(HALF).requires_grad_()
    incoming = torch.randn(1, sizes.heads, tokens, sizes.head_width, generator=draw, device=device).to(HALF)

    def side(sinks: Tensor | None) -> Callable[[], None]:
        leaves = [x for x in (query, key, value, sinks) if x is not None]

        def run() -> None:
            torch.autograd.grad(attend(query, key, value, documents, sinks_H=sinks), leaves, incoming)

        return run

    found = context.alternate({"sinks": side(sinks_H), "plain": side(None)}, keep=2)
    yield Figure(
        figure="attention with sinks / without", case=f"4 documents, {tokens} tokens, forward and backward",
        ours=found["sinks"].seconds, peer=found["plain"].seconds, unit="s",
    )  # fmt: skip


def _peak_in_single_precision(context: Context) -> Iterator[Figure]:
    """Whether grouped heads in float32 go without tokens × tokens: FlashAttention knows half precision only."""
    from treering.attention import Documents, attend

    context.device.free()
    device, sizes = context.device.torch_device, context.sizes
    tokens = sizes.attention_tokens
    query, key, value = (
        torch.randn(1, heads, tokens, sizes.head_width, device=device).requires_grad_()
        for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)
    )
    documents = Documents.of([tokens // 4] * 4, device)
    seconds, peak = context.time(lambda: attend(query, key, value, documents).sum().backward())
    size = query.numel() * query.element_size()
    case = f"4 documents, {tokens} tokens, {seconds:.2f} s"
    share = None if peak is None else peak / size
    yield Figure(figure="peak of attention in float32 / bytes of its query", case=case, ours=share, at_most=12.0)
