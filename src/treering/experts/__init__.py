"""Stacked experts: what happens inside the forward of the module that holds them."""
