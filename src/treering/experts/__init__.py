"""Stacked experts: routing to sorted rows, products by expert, and the one forward that techniques register with."""
