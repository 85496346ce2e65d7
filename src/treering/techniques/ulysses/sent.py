"""The messages of the exchange in a step of a model, once every technique is applied to it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from treering.core.module_forward import installed
from treering.technique import Message, Workload
from treering.techniques.ulysses.shares import Grid
from treering.techniques.ulysses.traffic import AttentionWidths, Traffic, messages, traffic

if TYPE_CHECKING:
    from treering.anatomy import Anatomy

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # what reads the attention's output


def layers(anatomy: "Anatomy") -> list[AttentionWidths]:
    """Return the heads and widths of each attention of a model."""
    return [
        AttentionWidths(heads=one.heads, kv_heads=one.kv_heads, head_dim=one.head_dim, value_dim=one.value_dim)
        for one in anatomy.attentions
    ]


def messages_of(
    model: nn.Module, anatomy: "Anatomy", grid: Grid, rank: int, work: Workload, *, padded: bool
) -> list[Message]:
    """Return what `rank` of the axis `sequence` sends in a step of `work`."""
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = Traffic()
    for one, widths in zip(anatomy.attentions, layers(anatomy)):
        block = anatomy.blocks[one.block].fqn
        sent = traffic(widths, grid, rank, work.tokens, padded=padded)
        before = _before(anatomy, one.block, learning)
        inside = {name for name in learning if name.startswith(f"{block}.")}
        again = getattr(installed(model.get_submodule(block)), "again", False) and bool(before or inside)
        back = bool(before) or any(_feeds(name, one.fqn, anatomy.blocks[one.block].mlp) for name in inside)
        total += sent.repeated(1 + again, int(back))
    return messages(total, grid, _itemsize(model, anatomy), work.micro_batches)


def _before(anatomy: "Anatomy", index: int, learning: set[str]) -> set[str]:
    """Return what learns in front of a block."""
    later = [block.fqn for block in anatomy.blocks[index:]] + ([anatomy.head.fqn] if anatomy.head else [])
    names = {name for name in learning if not any(name.startswith(f"{fqn}.") for fqn in later)}
    return names - {f"{anatomy.final_norm}.weight", f"{anatomy.final_norm}.bias"}


def _feeds(name: str, attention: str, mlp: str | None) -> bool:
    """Return whether a parameter of a block comes before the exchange of its attention."""
    if name.startswith(f"{attention}."):
        return not any(part in OUTPUTS for part in name.removeprefix(f"{attention}.").split("."))
    return mlp is None or not name.startswith(f"{mlp}.")


def _itemsize(model: nn.Module, anatomy: "Anatomy") -> int:
    """Return the bytes of an element of q, k and v: of the dtype in which sharded blocks compute, if it is set."""
    block: Any = model.get_submodule(anatomy.blocks[0].fqn)
    compute: torch.dtype | None = (
        block._get_fsdp_state()._mp_policy.param_dtype if isinstance(block, FSDPModule) else None
    )
    embedding: Any = model.get_submodule(anatomy.embeddings[0])
    return (compute or embedding.weight.dtype).itemsize
