"""Weights in 3, 4 or 8 bits."""

from treering.techniques.quantize.config import Quantize as Quantize
