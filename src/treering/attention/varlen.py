"""CUDA, half precision: FlashAttention over all documents at once, with sinks joined to the log-sum-exp.

Shapes: T tokens, H query heads, K key heads, D width (of query, key and value alike).
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from treering.attention.documents import Documents

# torch 2.11 shares key heads among query heads by itself; later versions need a keyword for it.
_HAS_GQA_KEYWORD = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    documents: Documents,
    *,
    scaling: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return T × H × D. A window of w tokens is the query itself and the w − 1 before it.

    The first `documents.keys_before` keys have no query: the kernel lets the last query and the last key of a document
    meet.
    """
    sides = (-1 if window is None else window - 1, 0)
    if sinks_H is not None:
        return _WithSinks.apply(query_THD, key_TKD, value_TKD, sinks_H, documents, scaling, sides)
    out_THD = varlen_attn(
        query_THD, key_TKD, value_TKD, *_lengths(documents),
        scale=scaling, window_size=sides, **_shared_heads(query_THD, key_TKD),
    )  # fmt: skip
    return cast(Tensor, out_THD)  # a pair only if the log-sum-exp is asked for


def _shared_heads(query_THD: Tensor, key_TKD: Tensor) -> dict[str, Any]:
    """Return the keyword for several query heads that have one key head, if this torch knows it."""
    return {"enable_gqa": query_THD.shape[1] != key_TKD.shape[1]} if _HAS_GQA_KEYWORD else {}


def _lengths(documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    """Return where documents end among queries and among keys, and two numbers that no document is longer than."""
    ends, longest = documents.cu_seqlens, documents.longest
    asked = (ends - documents.keys_before).clamp_(min=0) if documents.keys_before else ends
    return asked, ends, longest, longest


class _WithSinks(torch.autograd.Function):
    """Attention with sinks. s: the sink of a head, ℓ: the kernel's log-sum-exp; L = log(exp ℓ + exp s), o = õ exp(ℓ −
    L).

    The flash backward knows the softmax only by the log-sum-exp that it is given, and takes δ = do · o from the o that
    it is given. With L and the final o it is the backward of the softmax with the sink. The kernel's own autograd
    would not do: it ignores the gradient of ℓ.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, documents: Documents,
        scaling: float, sides: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        bare_THD, lse_HT, random = _flash(query, key, value, documents, scaling, sides)
        if lse_HT.shape != (query.shape[1], query.shape[0]):
            raise RuntimeError(f"the log-sum-exp of varlen_attn is {tuple(lse_HT.shape)}, not heads × tokens")
        norm_HT = torch.logaddexp(lse_HT, sinks.to(lse_HT.dtype)[:, None])
        out = (bare_THD * (lse_HT - norm_HT).exp().T[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, norm_HT, random)
        ctx.documents, ctx.scaling, ctx.sides = documents, scaling, sides
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, norm_HT, random = ctx.saved_tensors
        grad = grad.contiguous()
        d_query, d_key, d_value = _flash_backward(
            grad, query, key, value, out, norm_HT, random, ctx.documents, ctx.scaling, ctx.sides
        )
        delta_HT = (grad.to(norm_HT.dtype) * out.to(norm_HT.dtype)).sum(-1).T
        d_sinks = -((sinks.to(norm_HT.dtype)[:, None] - norm_HT).exp() * delta_HT).sum(-1).to(sinks.dtype)
        return d_query, d_key, d_value, d_sinks, None, None, None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float, sides: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp H × T and random state. The public varlen_attn has no backward that can be called."""
    return torch.ops.torch_attn._varlen_attn(
        query, key, value, *_lengths(documents), sides == (-1, 0), scaling, list(sides),
        **_shared_heads(query, key),
    )  # fmt: skip


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse_HT: Tensor, random: Tensor,
    documents: Documents, scaling: float, sides: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.torch_attn._varlen_attn_backward(
        grad, query, key, value, out, lse_HT, *_lengths(documents), sides == (-1, 0), random, scaling,
        list(sides),
    )  # fmt: skip
