"""The function that transformers' attention layers call: packed where `documents` are given, else what sdpa computes.

Shapes: B rows, H query heads, K key heads, T tokens, S keys (more than T with a cache), D and E widths.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from treering.attention.documents import Documents
from treering.attention.kernels import attend
from treering.core.errors import PlanError

# arguments of some layers' attention that change the result, and that no kernel here supports
_FOREIGN = ("position_bias", "indices", "block_indices", "cache")


# rotary embeddings whose frequencies depend on the longest position of a batch
BATCH_DEPENDENT = ("longrope", "dynamic")


# a graph break: kernels are chosen and cut by lengths on the host, and would be compiled again for every batch
@torch.compiler.disable
def attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSE: Tensor,
    attention_mask: "DeferredMask | Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Registered with transformers' AttentionInterface. Returns B × T × H × E."""
    if documents is None:
        return _unpacked(module, query_BHTD, key_BKSD, value_BKSE, attention_mask, dropout, scaling, kwargs)
    inside = documents.inside or documents
    _refuse(module, query_BHTD, key_BKSD, attention_mask, dropout, inside, kwargs)
    documents.check(query_BHTD.shape[2])

    def attended(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        return attend(query, key, value, inside, scaling=scaling, window=window, softcap=softcap, sinks_H=sinks)

    given = (query_BHTD, key_BKSD, value_BKSE, kwargs.get("s_aux"))
    exchange = documents.exchange
    out_BHTE = attended(*given) if exchange is None else exchange.around(attended, *given)
    return out_BHTE.transpose(1, 2).contiguous(), None


def _refuse(
    module: nn.Module, query: Tensor, key: Tensor, mask: "DeferredMask | Tensor | None", dropout: float,
    documents: Documents, kwargs: dict[str, Any],
) -> None:  # fmt: skip
    """Raise PlanError or DataError where the packed result would not be that of each document alone."""
    name = type(module).__name__
    if query.shape[0] != 1:
        raise PlanError(f"{name} got documents and {query.shape[0]} rows; packed tokens are one row, [1, T]")
    if dropout > 0:
        raise PlanError(
            f"{name} drops attention with p = {dropout}, which packed attention does not support; "
            "set the model's attention dropout to 0 (model.dropout: off) or set data.packing: off"
        )
    if key.shape[2] != query.shape[2]:
        raise PlanError(f"{name} got documents and a key-value cache; train with use_cache=False")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise PlanError(f"{name} is not causal; only causal self-attention can be packed")
    for foreign in _FOREIGN:
        if kwargs.get(foreign) is not None:
            raise PlanError(f"{name} uses {foreign}=, which packed attention does not support; switch packing off")
    if isinstance(mask, Tensor):
        raise PlanError(f"{name} got documents and an attention_mask; packed rows have no padding: leave the mask out")
    if isinstance(mask, DeferredMask):
        _refuse_mask(name, mask, documents, kwargs.get("sliding_window"))
    conflict = None if documents.rows else rope_conflict(getattr(module, "config", None), documents.lengths)
    if conflict:
        raise PlanError(conflict)


def _refuse_mask(name: str, mask: "DeferredMask", documents: Documents, window: int | None) -> None:
    """Refuse a mask whose window differs from the layer's keyword, which is what kernels get."""
    if mask.has_other_rule:
        raise PlanError(f"{name} has a mask rule of its own besides causality; switch packing off")
    if mask.window != window and min(mask.window or documents.longest, window or documents.longest) < documents.longest:
        raise PlanError(
            f"{name} masks a local size of {mask.window} but gives its attention a sliding window of {window}; "
            "it is not a known sliding window: switch packing off"
        )


def _unpacked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: "DeferredMask | Tensor | None", dropout: float,
    scaling: float | None, kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    mask = mask.built if isinstance(mask, DeferredMask) else mask
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    # sdpa refuses a softcap and silently leaves out the sinks
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = query.shape[2]
    if mask is None and tokens > 1:
        key, value = key[:, :, :tokens], value[:, :, :tokens]  # as sdpa does: an empty static cache is longer
        if dropout == 0:
            row = Documents.of([tokens], query.device)
            out = attend(query, key, value, row, scaling=scaling, softcap=softcap, sinks_H=sinks)
            return out.transpose(1, 2).contiguous(), None
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    return _masked(query, key, value, mask, dropout, scaling, softcap, sinks), None


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return B × T × H × E: softcap and sinks under a given mask, all scores at once, softmax in at least float32."""
    rows, heads, tokens, _ = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    scores = (grouped @ key.transpose(-1, -2)).view(rows, heads, tokens, -1).to(work) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        # not −∞: a row of left padding sees nothing, and would be nan
        scores = scores.masked_fill(~mask, torch.finfo(work).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(work)[None, :, None, None].expand(rows, -1, tokens, 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = nn.functional.dropout(scores.softmax(-1)[..., : key.shape[2]].to(value.dtype), dropout)
    out = p.view(rows, key.shape[1], -1, key.shape[2]) @ value
    return out.view(rows, heads, tokens, -1).transpose(1, 2).contiguous()


def rope_conflict(config: Any, lengths: Sequence[int]) -> str | None:
    """Return why these documents cannot share a row, or None. With frequencies that depend on the longest position of a
    batch, documents would change one another.

    longrope  changes its frequencies for all tokens as soon as one position is past the original length
    dynamic   stretches them with the longest position, for all tokens
    """
    if len(lengths) == 1:
        return None
    for rope in ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in BATCH_DEPENDENT:
            continue
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        beyond = sum(length > limit for length in lengths)
        if beyond and (kind == "dynamic" or beyond < len(lengths)):
            return (
                f"{beyond} of {len(lengths)} packed documents are longer than {limit} tokens, and this model's {kind} "
                "rotary embedding would then change the others too; pack documents of at most that length, or switch "
                "packing off"
            )
    return None


def ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of a model's rotary embedding: one mapping, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (rope for rope in parameters.values() if isinstance(rope, Mapping))


class DeferredMask:
    """The request for a square causal mask over complete rows, which is not built before an attention needs it.

    transformers makes the mask at the top of the model, where it does not know documents, and would guess them from the
    position ids and build S × S booleans. The request keeps no state between forward and recompute, and holds the
    window that the mask would have had.
    """

    def __init__(self, request: dict[str, Any]):
        self._request = request

    @property
    def window(self) -> int | None:
        return self._request.get("local_size")

    @property
    def has_other_rule(self) -> bool:
        """Whether the model is not causal, or adds a rule to its mask (an image's tokens see each other)."""
        overlaid = self._request["mask_function"].__qualname__.startswith("or_masks.")
        return overlaid or self._request.get("use_vmap", False) or "allow_is_bidirectional_skip" in self._request

    @cached_property
    def built(self) -> Tensor | None:
        """The mask that sdpa would have been given; None where `is_causal` is enough."""
        return sdpa_mask(**self._request)

    def contiguous(self) -> Tensor | None:
        """Return the built mask: `generate` with a static cache makes masks before the model, and calls this."""
        return None if self.built is None else self.built.contiguous()


def deferred_mask(**request: Any) -> "DeferredMask | Tensor | None":
    """Registered with transformers' AttentionMaskInterface. With padding or a cache there are no documents."""
    offsets = (request.get("q_offset", 0), request.get("kv_offset", 0))
    fresh = all(isinstance(offset, int) and offset == 0 for offset in offsets)  # a static cache counts on the device
    if request.get("attention_mask") is None and fresh and request["q_length"] == request["kv_length"]:
        return DeferredMask(request)
    return sdpa_mask(**request)
