"""Exact attention in chunks of queries, in plain torch: window, softcap, sinks, grouped heads, any widths, any device.

Memory is chunk × document, forward and backward: the probabilities are computed again in the backward from L.
With S = scaling q kᵀ, C = softcap · tanh(S / softcap) (C = S without softcap) and the sink s of the head:

    L = log(Σ_j exp C_j + exp s),   P = exp(C − L),   o = P v
    δ = dо · o,   dC = P (do vᵀ − δ),   ds = −Σ exp(s − L) δ,   dS = dC (1 − (C / softcap)²)

The sink only enlarges L. Shapes: H query heads, K key heads, G = H / K, T tokens, C queries, N keys, D and E widths.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treering.attention.documents import Documents

CHUNK = 64  # queries at a time: a good matrix product on CPUs, and 64 × document floats per head


class _Rule(NamedTuple):
    lengths: tuple[int, ...]
    before: int  # keys in front of the first query
    scaling: float
    window: int | None
    softcap: float | None


def chunked(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTE: Tensor,
    documents: Documents,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return H × T × E, in the dtype of the query; computed in at least float32.

    The first `documents.keys_before` keys have no query.
    """
    rule = _Rule(documents.lengths, documents.keys_before, scaling, window, softcap)
    return _Chunked.apply(query_HTD, key_KTD, value_KTE, sinks_H, rule)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rule: _Rule) -> Tensor:
        work = torch.promote_types(query.dtype, torch.float32)
        key_KTD, value_KTE = key.to(work), value.to(work)
        out_HTE = query.new_empty(*query.shape[:2], value.shape[-1])
        norm_HT = query.new_empty(query.shape[:2], dtype=work)
        for queries, keys in _spans(rule):
            scores = _scores(_grouped(query[:, queries].to(work), key), key_KTD[:, keys], queries, keys, rule)
            norm = scores.logsumexp(-1)
            if sinks is not None:
                sink_KG = sinks.to(work).view(len(key), -1).repeat_interleave(queries.stop - queries.start, dim=1)
                norm = torch.logaddexp(norm, sink_KG)
            out = (scores - norm[..., None]).exp_() @ value_KTE[:, keys]
            out_HTE[:, queries] = _ungrouped(out, len(query)).to(query.dtype)
            norm_HT[:, queries] = _ungrouped(norm[..., None], len(query))[..., 0]
        ctx.save_for_backward(query, key, value, sinks, out_HTE, norm_HT)
        ctx.rule = rule
        return out_HTE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, norm_HT = ctx.saved_tensors
        rule, work = ctx.rule, norm_HT.dtype
        key_KTD, value_KTE = key.to(work), value.to(work)
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key = torch.zeros_like(key_KTD, memory_format=torch.contiguous_format)
        d_value = torch.zeros_like(value_KTE, memory_format=torch.contiguous_format)
        delta_HT = (grad.to(work) * out.to(work)).sum(-1)
        for queries, keys in _spans(rule):
            q = _grouped(query[:, queries].to(work), key)
            do = _grouped(grad[:, queries].to(work), key)
            delta = _grouped(delta_HT[:, queries, None], key)
            capped = _scores(q, key_KTD[:, keys], queries, keys, rule)
            p = (capped - _grouped(norm_HT[:, queries, None], key)).exp_()
            d_value[:, keys] += p.transpose(1, 2) @ do
            d_scores = p * (do @ value_KTE[:, keys].transpose(1, 2) - delta)
            if rule.softcap is not None:
                # hidden scores are −∞ and have p = 0: without the clamp the product would be nan
                d_scores *= 1 - (capped.clamp_(min=-rule.softcap) / rule.softcap).square()
            d_scores *= rule.scaling
            d_query[:, queries] = _ungrouped(d_scores @ key_KTD[:, keys], len(query)).to(query.dtype)
            d_key[:, keys] += d_scores.transpose(1, 2) @ q
        d_sinks = None
        if sinks is not None:
            d_sinks = -((sinks.to(work)[:, None] - norm_HT).exp() * delta_HT).sum(-1).to(sinks.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None


def _spans(rule: _Rule) -> Iterator[tuple[slice, slice]]:
    """Yield chunks of queries, each with the range of keys that it can see."""
    start = 0
    for length in rule.lengths:
        stop = start + length
        for first in range(max(start, rule.before), stop, CHUNK):
            last = min(first + CHUNK, stop)
            seen = start if rule.window is None else max(start, first - rule.window + 1)
            yield slice(first - rule.before, last - rule.before), slice(seen, last)
        start = stop


def _scores(q: Tensor, key: Tensor, queries: slice, keys: slice, rule: _Rule) -> Tensor:
    """Return K × (G·C) × N scores, hidden ones −∞."""
    scores = (q @ key.transpose(1, 2)).mul_(rule.scaling)
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    rows = torch.arange(queries.start, queries.stop, device=q.device)[:, None] + rule.before
    age = rows - torch.arange(keys.start, keys.stop, device=q.device)
    hidden = age < 0
    if rule.window is not None:
        hidden |= age >= rule.window
    return scores.masked_fill_(hidden.repeat(q.shape[1] // len(rows), 1), -math.inf)


def _grouped(x_HCD: Tensor, key: Tensor) -> Tensor:
    """H × C × D → K × (G·C) × D: the queries that share a key head stand under each other, so no key is copied."""
    return x_HCD.reshape(len(key), -1, x_HCD.shape[-1])


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    return x.reshape(heads, -1, x.shape[-1])
