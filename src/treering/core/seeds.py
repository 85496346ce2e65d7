"""Randomness as a pure function of (seed, name, step): never of rank, world size or the order of calls."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the thing called `names`, e.g. `derive(0, "lora",
    "model.layers.3.mlp.up_proj.weight")`."""
    text = "\0".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> "torch.Generator":
    """Return a CPU generator for `names`: CPU, so that every device and machine draws the same numbers."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))
