"""The mask that is not built: the request is kept, and met only if an attention without documents needs it.

transformers makes the mask at the top of the model, where it does not know our documents, and where it would guess them
from the position ids and build S × S booleans. A value that only remembers the request has no state between forward and
recompute, and tells the attention which window the mask would have had.
"""

from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.masking_utils import sdpa_mask


class Deferred:
    """A square causal mask over whole rows, as requested."""

    def __init__(self, request: dict[str, Any]):
        self._request = request

    @property
    def window(self) -> int | None:
        return self._request.get("local_size")

    @property
    def own_rule(self) -> bool:
        """The model is not causal, or adds a rule of its own (an image's tokens see each other, say)."""
        overlaid = self._request["mask_function"].__qualname__.startswith("or_masks.")
        return overlaid or self._request.get("use_vmap", False) or "allow_is_bidirectional_skip" in self._request

    @cached_property
    def built(self) -> Tensor | None:
        """What sdpa would have been given; None where `is_causal` says it all."""
        return sdpa_mask(**self._request)

    def contiguous(self) -> Tensor | None:
        """`generate` with a static cache makes masks ahead of the model, and calls this on them: build it there."""
        return None if self.built is None else self.built.contiguous()


def deferred_mask(**request: Any) -> "Deferred | Tensor | None":
    """Registered with transformers' AttentionMaskInterface. With padding or a cache there are no documents."""
    offsets = (request.get("q_offset", 0), request.get("kv_offset", 0))
    fresh = all(isinstance(offset, int) and offset == 0 for offset in offsets)  # a static cache counts on the device
    if request.get("attention_mask") is None and fresh and request["q_length"] == request["kv_length"]:
        return Deferred(request)
    return sdpa_mask(**request)
