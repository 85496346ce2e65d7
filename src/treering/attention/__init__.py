"""Packed-document attention for any transformers causal language model, and the kernels it is made of."""

from treering.attention.documents import Documents, Exchange
from treering.attention.install import NAME, install, packable
from treering.attention.kernels import attend

__all__ = ["NAME", "Documents", "Exchange", "attend", "install", "packable"]
