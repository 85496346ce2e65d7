"""One function for packed attention, and `choose`, which selects its kernel.

Shapes: B rows, H query heads, K key heads, T tokens, D width of query and key, E width of value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from treering.attention.chunks import chunked
from treering.attention.documents import Documents

Kernel = Literal["sdpa", "chunks", "varlen", "flex"]
# device type -> kernel, for devices outside torch
_registered: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {}


def register_kernel(device: str, kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> None:
    """Make `attend` call `kernel` for every attention on devices of this type.

    Args:
        device: A device type, as `torch.device.type` has it.
        kernel: (query H × T × D, key K × T × D, value K × T × E, sinks H or None) -> H × T × E.
    """
    _registered[device] = kernel


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features that one attention layer needs. `window` is False when no document is longer than it."""

    dtype: torch.dtype
    width: int  # the wider of the head widths of query and value
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    keys_before: bool = False  # the first keys have no queries
    flash: bool = True  # the card can run FlashAttention 2 (compute capability 8.0 or newer)


def choose(device: str, features: Features) -> Kernel:
    """Return the fastest kernel that is exact for `features` on a device of this type.

    sdpa    torch's scaled_dot_product_attention: one call per document, or one for documents of one length
    chunks  plain torch, in chunks of queries: every feature, on every device
    varlen  torch.nn.attention.varlen: FlashAttention over all documents at once, CUDA, half precision
    flex    torch.nn.attention.flex_attention, compiled: softcap on CUDA; it has no backward on the CPU
    """
    plain = not (features.window or features.softcap or features.sinks)
    if device != "cuda":
        return "sdpa" if plain else "chunks"
    half = features.dtype in (torch.float16, torch.bfloat16)
    if half and features.flash and features.width <= 256 and not features.softcap:
        return "varlen"
    capped = features.softcap and not features.sinks and not features.keys_before
    if capped and (half or features.dtype == torch.float32):
        # Triton's dot needs a head at least 16 wide; above 256 the tiles no longer fit
        if 16 <= features.width <= 256:
            return "flex"
    return "sdpa" if plain else "chunks"


def attend(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    documents: Documents,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return causal attention inside each document, B × H × T × E. With several rows, each is cut into these documents.
    Where `documents.queries` names some ranges of one row, T of the query is the number of their tokens.

    `window`: a token sees itself and the `window − 1` before it. `sinks_H`: one logit per head that takes part in the
    softmax and has no value. `scaling` defaults to 1/√D.
    """
    rows, heads, tokens, width = query_BHTD.shape
    scaling = 1 / math.sqrt(width) if scaling is None else scaling
    documents.check(key_BKTD.shape[2])
    if rows > 1:
        assert documents.queries is None, "ranges of queries are of one row"
        documents = Documents.of(documents.lengths * rows, query_BHTD.device)
    query, key, value = (_one_row(x) for x in (query_BHTD, key_BKTD, value_BKTE))

    def one(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        return _attend(query, key, value, documents, scaling, window, softcap, sinks_H)

    if documents.queries is None:
        out = one(query, key, value, documents)
    else:
        lengths = [seen.tokens - seen.keys_before for _, seen in documents.queries]
        spans = [keys for keys, _ in documents.queries]
        pieces = zip(query.split(lengths, dim=1), _Spans.apply(key, spans), _Spans.apply(value, spans))
        outputs = [one(q, k, v, seen) for (q, k, v), (_, seen) in zip(pieces, documents.queries)]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.view(heads, rows, tokens, -1).transpose(0, 1)


class _Spans(torch.autograd.Function):
    """Spans of tokens that overlap, [H, T, D] each. Their gradients are added in one tensor: those of slices would each
    be a tensor of all tokens."""

    @staticmethod
    def forward(ctx: Any, x_HTD: Tensor, spans: Sequence[slice]) -> tuple[Tensor, ...]:
        ctx.spans, ctx.tokens = spans, x_HTD.shape[1]
        return tuple(x_HTD[:, span] for span in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        heads, _, width = gradients[0].shape
        total = gradients[0].new_zeros(ctx.tokens, heads, width).transpose(0, 1)
        for span, gradient in zip(ctx.spans, gradients):
            total[:, span] += gradient
        return total, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float, window: int | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return H × T × E, by the kernel for these features."""
    window = None if window is None or window >= documents.longest else window
    if query.device.type in _registered:
        return _registered[query.device.type](query, key, value, sinks)
    features = Features(
        dtype=query.dtype,
        width=max(query.shape[-1], value.shape[-1]),
        window=window is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
        keys_before=documents.keys_before > 0,
        flash=not query.is_cuda or torch.cuda.get_device_capability(query.device) >= (8, 0),
    )
    match choose(query.device.type, features):
        case "sdpa":
            return _per_document(query, key, value, documents, scaling)
        case "varlen":
            return _varlen(query, key, value, documents, scaling, window, sinks)
        case "flex":
            from treering.attention.flex import flex

            assert softcap is not None
            return flex(query, key, value, documents.to(query.device), scaling=scaling, softcap=softcap, window=window)
        case "chunks":
            return chunked(query, key, value, documents, scaling=scaling, window=window, softcap=softcap, sinks_H=sinks)


def _one_row(x_BHTD: Tensor) -> Tensor:
    return x_BHTD[0] if len(x_BHTD) == 1 else x_BHTD.transpose(0, 1).flatten(1, 2)


def _per_document(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float) -> Tensor:
    """Return heads × T × E. Split, not sliced: the gradient of many slices would each be a tensor of all tokens."""
    width = value.shape[-1]
    wide = _same_width(query, key, value, multiple=1)
    count = len(documents.lengths)
    if count > 1 and len(set(documents.lengths)) == 1 and not documents.keys_before:
        # In one call, each with the same bits as alone.
        q, k, v = (x.unflatten(1, (count, -1)).transpose(0, 1) for x in wide)
        return _documents(q, k, v, scaling).transpose(0, 1).flatten(1, 2)[..., :width].contiguous()
    asked = [documents.lengths[0] - documents.keys_before, *documents.lengths[1:]]
    pieces = zip(wide[0].split(asked, dim=1), *(x.split(documents.lengths, dim=1) for x in wide[1:]))
    outputs = [_documents(q[None], k[None], v[None], scaling)[0] for q, k, v in pieces]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out if out.shape[-1] == width else out[..., :width].contiguous()


def _documents(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return documents × heads × T × E of the last T tokens of documents of one length."""
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda:
        # What FlashAttention does not take comes here on a card. The kernel that saves memory without it knows no
        # grouped heads, and with them torch would compute T × T scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        gqa = False
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
    if q.is_cuda:  # the last query and the last key meet; a kernel that saves memory knows this without a mask
        bias = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
    # Other causal kernels begin both at the first token, and a mask would be T × T.
    one = Documents.of([k.shape[2]]).with_queries([range(k.shape[2] - q.shape[2], k.shape[2])])
    assert one.queries is not None
    return chunked(q[0], k[0], v[0], one.queries[0][1], scaling=scaling)[None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float, window: int | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    from treering.attention.varlen import varlen

    width = value.shape[-1]
    query, key, value = (x.transpose(0, 1) for x in _same_width(query, key, value, multiple=8))
    out = varlen(query, key, value, documents.to(query.device), scaling=scaling, window=window, sinks_H=sinks)
    return out[..., :width].transpose(0, 1)


def _same_width(query: Tensor, key: Tensor, value: Tensor, *, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three with zeros up to a common width, which is exact: flash kernels need it, and the math kernel
    would compute T × T scores."""
    width = -(-max(query.shape[-1], value.shape[-1]) // multiple) * multiple

    def wide(x: Tensor) -> Tensor:
        return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))

    return wide(query), wide(key), wide(value)
