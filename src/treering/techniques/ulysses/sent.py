"""The messages of the exchange in a step of a model, once every technique is applied to it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from treering.core.module_forward import installed
from treering.technique import Message, Workload
from treering.techniques.ulysses.shares import Grid
from treering.techniques.ulysses.traffic import AttentionWidths, SentForm, Traffic, messages, traffic

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Attention, Block

# By parts of their names: parameters of an attention that come after the exchange, and norms of a block that do.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
LATER = ("post_", "pre_feedforward", "pre_mlp", "ffn", "ln_2")
QUERIES = ("q_", "query")  # that only queries depend on


def layers(anatomy: "Anatomy") -> list[AttentionWidths]:
    """Return the heads and widths of each attention of a model."""
    return [
        AttentionWidths(heads=one.heads, kv_heads=one.kv_heads, head_dim=one.head_dim, value_dim=one.value_dim)
        for one in anatomy.attentions
    ]


def messages_of(
    model: nn.Module, anatomy: "Anatomy", grid: Grid, rank: int, work: Workload, form: SentForm
) -> list[Message]:
    """Return what `rank` of the axis `sequence` sends in a step of `work`."""
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = Traffic()
    for one, widths in zip(anatomy.attentions, layers(anatomy)):
        block = anatomy.blocks[one.block]
        before = _before(anatomy, one.block, learning)
        inside = {name for name in learning if name.startswith(f"{block.fqn}.")}
        again = getattr(installed(model.get_submodule(block.fqn)), "again", False) and bool(before or inside)
        feeding = [name for name in inside if _feeds(name, one, block)]
        keys = bool(before) or any(not _is_of_queries(name, one) for name in feeding if name != one.sinks)
        inputs = keys or any(name != one.sinks for name in feeding)
        sent = traffic(widths, grid, rank, work.tokens, form)
        total += sent.repeated(
            forwards=1 + again + work.own_teacher,
            inputs=int(inputs),
            keys=int(inputs if grid.heads > 1 else keys),  # of one message, all have a gradient or none
            outputs=int(inputs or bool(feeding)),
        )
    return messages(total, grid, work.micro_batches)


def _before(anatomy: "Anatomy", index: int, learning: set[str]) -> set[str]:
    """Return what learns in front of a block."""
    later = [block.fqn for block in anatomy.blocks[index:]] + ([anatomy.head.fqn] if anatomy.head else [])
    names = {name for name in learning if not any(name.startswith(f"{fqn}.") for fqn in later)}
    return names - {f"{anatomy.final_norm}.weight", f"{anatomy.final_norm}.bias"}


def _feeds(name: str, attention: "Attention", block: "Block") -> bool:
    """Return whether the exchange of a block's attention depends on a parameter of the block."""
    if name.startswith(f"{attention.fqn}."):
        return not any(part in OUTPUTS for part in name.removeprefix(f"{attention.fqn}.").split("."))
    if block.mlp is not None and name.startswith(f"{block.mlp}."):
        return False
    return not any(part in name.removeprefix(f"{block.fqn}.") for part in LATER)


def _is_of_queries(name: str, attention: "Attention") -> bool:
    own = name.removeprefix(f"{attention.fqn}.")
    return own != name and own.startswith(QUERIES)


def itemsize(model: nn.Module, anatomy: "Anatomy") -> int:
    """Return the bytes of an element of q, k and v: of the dtype in which sharded blocks compute, if it is set."""
    block: Any = model.get_submodule(anatomy.blocks[0].fqn)
    compute: torch.dtype | None = (
        block._get_fsdp_state()._mp_policy.param_dtype if isinstance(block, FSDPModule) else None
    )
    embedding: Any = model.get_submodule(anatomy.embeddings[0])
    return (compute or embedding.weight.dtype).itemsize
