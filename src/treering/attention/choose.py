"""Which kernel computes a packed attention: a pure function of the device and of what the layer asks for."""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["sdpa", "chunks", "varlen", "flex"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one attention layer asks for. `window` is False when no document is longer than it."""

    dtype: torch.dtype
    width: int  # the wider of the head widths of query and value
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    flash: bool = True  # the card can run FlashAttention 2 (compute capability 8.0 or newer)


def choose(device: str, features: Features) -> Kernel:
    """The fastest kernel that is exact for `features` on a device of this type.

    sdpa    one call of torch's scaled_dot_product_attention per document
    chunks  our own, plain torch, in chunks of queries: everything, everywhere
    varlen  torch.nn.attention.varlen: FlashAttention over all documents at once, CUDA, half precision
    flex    torch.nn.attention.flex_attention, compiled: softcap on CUDA; it has no backward on the CPU
    """
    plain = not (features.window or features.softcap or features.sinks)
    if device != "cuda":
        return "sdpa" if plain else "chunks"
    half = features.dtype in (torch.float16, torch.bfloat16)
    if half and features.flash and features.width <= 256 and not features.softcap:
        return "varlen"
    if features.softcap and not features.sinks and (half or features.dtype == torch.float32):
        # Triton's dot needs a head at least 16 wide; above 256 the tiles no longer fit
        if 16 <= features.width <= 256:
            return "flex"
    return "sdpa" if plain else "chunks"
