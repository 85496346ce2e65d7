"""Checkpoints of a run: their files and manifest, their tensors, and when they are saved."""
