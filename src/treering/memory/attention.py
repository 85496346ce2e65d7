"""Attention for traces of memory: one fused kernel, whatever its name.

Shapes: B rows, H query heads, K key heads, T tokens, D and E widths.

FlashAttention keeps query, key, value, its output and one log-sum-exp per token and head. Its backward adds up the
query's gradient in float32, and where several heads share a key it computes a gradient per head before it sums them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from treering.attention import NAME as OURS
from treering.attention.kernels import register_kernel
from treering.memory import pretend

NAME = "treering_shapes"


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        tokens, heads, _ = query.shape
        out_THE = query.new_empty(tokens, heads, value.shape[-1])
        norm_HT = query.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, sinks, out_THE, norm_HT)
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, _, norm_HT = ctx.saved_tensors
        gradient = gradient.contiguous()
        d_query, d_key, d_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        working = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(norm_HT)]
        if query.shape[1] != key.shape[1]:
            working += [x.new_empty(x.shape[0], query.shape[1], x.shape[-1]) for x in (key, value)]
        del working
        return d_query, d_key, d_value, None if sinks is None else torch.empty_like(sinks)


def kernel(query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Return the output, H × T × E, as the kernel of `treering.attention.attend` on the stand-in device."""
    flat = (x.transpose(0, 1) for x in (query_HTD, key_KTD, value_KTE))
    return _Fused.apply(*flat, sinks_H).transpose(0, 1).contiguous()


def attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    attention_mask: Any = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the output, B × T × H × E, as the attention of transformers for a model that cannot have treering's."""
    rows, heads, tokens, _ = query_BHTD.shape
    query, key, value = (x.transpose(0, 1).flatten(1, 2) for x in (query_BHTD, key_BKTD, value_BKTE))
    out_HTE = kernel(query, key, value, s_aux)
    return out_HTE.view(heads, rows, tokens, -1).transpose(0, 1).transpose(1, 2).contiguous(), None


def no_mask(**request: Any) -> None:
    """Return no mask: nothing of tokens × tokens is computed."""


def install(model: nn.Module) -> None:
    """Replace every attention of `model` by one that needs the memory of one fused kernel.

    A model that has treering's attention keeps it, with what is called around the kernel; `kernel` is registered for
    the stand-in device. Another model's configurations are changed: it is thrown away after its trace.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

    register_kernel(pretend.NAME, kernel)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, no_mask)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PretrainedConfig) and value._attn_implementation != OURS:
                value._attn_implementation = NAME
