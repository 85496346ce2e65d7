"""Full precision for products that compute weights or keep something orthogonal, whatever the surrounding loop set.

A basis rounded to bfloat16 or TF32 leaks 3e-3 of what it protects. A loop may run under autocast, or may have allowed
TF32 for the complete process: neither affects these products, and both are restored afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply without autocast and without TF32 inside the context."""
    with uncast():
        if torch.compiler.is_compiling():  # a setting of the process cannot be changed inside a compiled forward
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def uncast() -> Iterator[None]:
    """Switch autocast off inside the context."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
