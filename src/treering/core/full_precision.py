"""Full precision for products that make weights or hold something orthogonal, whatever the surrounding loop chose.

A basis rounded to bfloat16 or TF32 leaks 3e-3 of what it is to hold. Somebody's loop may run under autocast, or may
have allowed TF32 for the whole process: neither is to reach these products, and both are as they were afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactly() -> Iterator[None]:
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
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
