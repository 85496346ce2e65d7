"""Toy runs whose memory is predicted, and the same runs with real memory on this machine."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf

import treering as tr
from treering.core.topology import mesh
from treering.memory import pretend
from treering.memory.forecast import Subject
from treering.memory.timeline import Timeline
from treering.memory.trace import batch, watch
from treering.memory.tracker import Tracker
from treering.plan import draft
from treering.plan.load import materialise
from treering.plan.run import Run

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def llama(**different: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(**(SIZES | different))


def moe(**different: Any) -> hf.Qwen3MoeConfig:
    experts = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return hf.Qwen3MoeConfig(**(SIZES | experts | different))


def llama_8b(**different: Any) -> hf.LlamaConfig:
    return llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        **different,
    )


def adamw(run: Run) -> Sequence[torch.optim.Optimizer]:
    return [run.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)]


def subject(
    config: Any,
    techniques: Sequence[Any],
    *,
    on: str = pretend.NAME,
    sizes: dict[str, int] | None = None,
    **settings: Any,
) -> Subject:
    settings = {"dtype": torch.float32, "optimizers": adamw} | settings
    return Subject(config=config, techniques=techniques, mesh=lambda: mesh(device=on, **(sizes or {})), **settings)


def really(settings: Subject, length: int) -> Timeline:
    """A step with real memory, all blocks, on the CPU; messages of several ranks go nowhere, their buffers are real."""
    with pretend.ranks(settings.world):
        return of_this_rank(settings, length)


def of_this_rank(settings: Subject, length: int) -> Timeline:
    """A step with real memory of a process that is a rank already."""
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(settings.config, dtype=settings.dtype)
    plan = draft(model, settings.techniques, mesh=settings.mesh(), weights=False, objective=settings.objective)
    for one in (plan, plan.teacher):
        if one is not None:
            materialise(one.model, CPU, CPU)
            for parameter in one.model.parameters():
                torch.nn.init.constant_(parameter.data, 0.01)
    tracker = Tracker(CPU)
    with tracker:
        tokens = batch(length, CPU, packed=plan.unpackable is None)
        if "documents" in tokens:
            tokens["documents"] = tr.attention.Documents.of([length])
        return watch(Run(plan, lost={}), [tokens], optimizers=settings.optimizers, tracker=tracker, clip=settings.clip)
