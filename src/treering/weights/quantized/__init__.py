"""Quantized weights of published folders, read without rounding."""
