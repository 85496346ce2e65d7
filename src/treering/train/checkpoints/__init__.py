"""Checkpoints of a run: files, manifest, what they hold, when they are made."""
