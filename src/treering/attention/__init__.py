"""Packed-document attention for any transformers causal language model, and the kernels it is made of."""

from treering.attention.documents import Documents, Exchange
from treering.attention.install import NAME, install
from treering.attention.kernels import attend
from treering.attention.packable import packable

__all__ = ["NAME", "Documents", "Exchange", "attend", "install", "packable"]
