"""Imported once by the process that all ranks are forked from: what each of them would otherwise do again."""

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import tests.chaos.toy  # noqa: F401 — all that a run imports

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, and keeps them
