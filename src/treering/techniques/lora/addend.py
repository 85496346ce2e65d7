"""An adapter beside a linear: a small module of its own, added to the linear's output.

    A_rM  rank × inputs        B_Nr  outputs × rank

A module of its own, because FSDP's unit of dtype is the module: adapters pinned to float32 inside a bfloat16 model
need a unit that does not cast them.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core import module_forward as forwards
from treering.core.errors import PlanError
from treering.technique import Applied, Part, Site, TrainedMatrix
from treering.techniques.lora import start
from treering.techniques.lora.peft_format import describe

if TYPE_CHECKING:
    from treering.anatomy import Linear
    from treering.techniques.lora.settings import LoRASettings


class Addend(nn.Module):
    """s · B A x, computed in the dtype of A and B, returned in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x.to(self.A.dtype), self.A)
        return (F.linear(low, self.B) * self.scale).to(x.dtype)

    def matrices(self, own: str, linear: str) -> tuple[TrainedMatrix, TrainedMatrix]:
        """Return where the inputs and output gradients of A and B are seen; their live names begin with `own`."""
        return (
            TrainedMatrix(name=f"{own}.A", module=linear, outputs=lambda g: g.to(self.B.dtype) @ self.B * self.scale),
            TrainedMatrix(
                name=f"{own}.B",
                module=linear,
                inputs=lambda a: F.linear(a.to(self.A.dtype), self.A),
                outputs=lambda g: g.to(self.B.dtype) * self.scale,
            ),
        )


def attach(model: nn.Module, config: "LoRASettings", site: Site) -> Applied:
    parts, names, undone, maps = {}, [], [], {}
    added: list[forwards.AddedForward] = []
    linears = config.linears(site.anatomy)
    for linear in linears:
        module = model.get_submodule(linear.fqn)
        weight = getattr(module, "weight", None)
        if config.dtype != "base":
            dtype = getattr(torch, config.dtype)
        elif weight is not None:
            dtype = weight.dtype
        else:
            raise PlanError(f"lora: {linear.fqn} holds no plain weight to take the dtype of; set lora.dtype")
        addend = Addend(linear.inputs, linear.outputs, config.rank, config.scale, dtype, torch.device("meta"))
        child = f"lora_{config.name}"
        if hasattr(module, child):
            raise PlanError(
                f"lora: {linear.fqn} already has an adapter called {config.name!r}; give this one another name"
            )
        module.add_module(child, addend)
        added.append(forwards.AddedForward(module, addend))
        undone.append(forwards.install(added[-1]))
        own = f"{linear.fqn}.{child}"
        maps[linear.weight] = addend.matrices(own, linear.fqn)
        names += [f"{own}.A", f"{own}.B"]
        stored = weight.dtype if weight is not None else torch.float32
        parts[linear.weight] = _part(linear, config, own, dtype, stored, site.seed)

    note = f"{len(linears)} adapters of rank {config.rank}, scale {config.scale:g}, start {config.init}"
    return Applied(
        trainable=tuple(names),
        parts=parts,
        adapter=describe(config, linears, site.anatomy),
        undo=forwards.undo_all(undone),
        maps=maps,
        # PiSSA moved part of the base into A and B: without them, the model is not the base model.
        without=None if config.init == "pissa" else partial(forwards.switched_off, added),
        notes=(note,),
    )


def _part(
    linear: "Linear", config: "LoRASettings", own: str, dtype: torch.dtype, stored: torch.dtype, seed: int
) -> Part:
    def product(tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        BA = (tensors[f"{own}.B"].to(wide) @ tensors[f"{own}.A"].to(wide)).mul_(config.scale)
        return (BA.T if linear.transposed else BA).to(like.device)

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        return below + product(tensors, below)

    pissa = config.init == "pissa"
    return Part(
        names=(f"{own}.A", f"{own}.B"),
        split=start.splitter(linear, config, own, seed),
        join=join,
        reads_weight=pissa,
        moves_base=pissa,
        compute_dtype=None if config.dtype == "base" else dtype,
        tolerance=_tolerance(config, dtype, stored),
        cost=float(min(linear.inputs, linear.outputs) * linear.inputs * linear.outputs) if pissa else 0.0,
    )


def _tolerance(config: "LoRASettings", dtype: torch.dtype, stored: torch.dtype) -> float | None:
    if config.init == "file":
        return None  # an imported adapter changes the weight: that is what it is for
    if config.init == "kaiming_zeros":
        return 0.0
    # The moved base is rounded to the dtype it is stored in, and A and B to theirs.
    return 4 * max(torch.finfo(stored).eps, torch.finfo(dtype).eps)
