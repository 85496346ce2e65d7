"""Stacked experts assigned to ranks: each rank of the axis `expert` owns some, and its unit shards only these.

    stack [E, …]      Shard(0) over `expert`: rank p owns E / P experts       then fully_shard over `efsdp`

Gradients are right as sums: a rank computes all rows that the ranks of its `expert` group sent for its experts, and
FSDP adds over `efsdp` and `replicate` what the other groups sent.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from treering.anatomy.matrices import of_experts
from treering.core.errors import PlanError
from treering.core.module_forward import install, installed
from treering.experts.assigned import LocalExperts
from treering.experts.dispatch import DispatchedExperts
from treering.experts.grouped_forward import grouped_beneath
from treering.techniques.shard.traffic import Dispatch, is_of_experts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy, Experts


def check_experts(anatomy: "Anatomy", ranks: int) -> None:
    """Raise PlanError unless the experts of every layer can be assigned to `ranks` in equal parts."""
    if ranks == 1:
        return
    if not anatomy.experts:
        raise PlanError(
            f"the mesh has expert={ranks}, and this {anatomy.model_type} model has no stacked experts; leave it out",
            settings=("mesh.expert",),
        )
    for experts in anatomy.experts:
        if experts.number % ranks:
            divisors = [n for n in range(1, experts.number + 1) if experts.number % n == 0]
            raise PlanError(
                f"the mesh has expert={ranks}, which does not divide the {experts.number} experts of {experts.fqn}; "
                f"choose expert from {', '.join(map(str, divisors))}",
                settings=("mesh.expert",),
            )


def assign_experts(model: nn.Module, anatomy: "Anatomy", view: "DeviceMesh") -> tuple[str, ...]:
    """Assign experts to the ranks of `view`, and install the exchange of their rows. Return the modules' names."""
    for experts in anatomy.experts:
        module = model.get_submodule(experts.fqn)
        _check_stacked(module, experts)
        grouped = grouped_beneath(module, experts.fqn)
        for one in module.modules():
            for name, parameter in one._parameters.items():
                if parameter is not None:
                    one._parameters[name] = _of_owner(parameter, view["expert"])
        install(DispatchedExperts(module, grouped, view["expert"].get_group(), experts.number))
    return tuple(experts.fqn for experts in anatomy.experts)


def _check_stacked(module: nn.Module, experts: "Experts") -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    other = [name for name, tensor in tensors if tensor.shape[:1] != (experts.number,)]
    # What a technique stores next to the experts is sharded as they will be; any other buffer is that of all experts.
    other += [name for name, buffer in module.named_buffers() if not is_of_experts(buffer)]
    if other:
        raise PlanError(
            f"{experts.fqn}.{other[0]} is not a parameter with one row for each of the {experts.number} experts, so it "
            "cannot be assigned to ranks with them; leave expert out of the mesh",
            settings=("mesh.expert",),
        )


def _of_owner(parameter: nn.Parameter, mesh: "DeviceMesh") -> nn.Parameter:
    """Return the parameter, on the meta device, as the part of this rank's experts."""
    each = parameter.shape[0] // mesh.size()
    rows = torch.empty(each, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
    strides = torch.empty(parameter.shape, device="meta").stride()
    placed = DTensor.from_local(rows, mesh, [ShardPlacement(0)], run_check=False, shape=parameter.shape, stride=strides)
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


def show_local(module: nn.Module) -> None:
    """Let a module inside experts that is an FSDP unit of its own compute with the part of this rank's experts."""
    install(LocalExperts(module))


def note(anatomy: "Anatomy", view: "DeviceMesh") -> str:
    """Return the line for explain()."""
    ranks, numbers = view["expert"].size(), sorted({experts.number for experts in anatomy.experts})
    each = " or ".join(f"{number // ranks} of {number}" for number in numbers)
    return (
        f"each rank has {each} experts of {len(anatomy.experts)} blocks, sharded over {view['efsdp'].size()} ranks; "
        "messages and memory are those of tokens that choose all experts equally often"
    )


def dispatches(
    model: nn.Module, anatomy: "Anatomy", view: "DeviceMesh", compute: torch.dtype | None
) -> tuple[Dispatch, ...]:
    """Return the exchange of each layer, in the order of the layers. `compute`: the dtype of the arithmetic, if set."""
    config: Any = model.config
    choices = config.get_text_config().num_experts_per_tok
    embedding: Any = model.get_submodule(anatomy.embeddings[0])
    dtype: torch.dtype = compute or embedding.weight.dtype
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for block in anatomy.blocks:
        inside = {name for name in learning if name.startswith(f"{block.fqn}.")}
        later = {name for one in anatomy.blocks[block.index + 1 :] for name in learning if _within(name, one.fqn)}
        head = {name for name in learning if anatomy.head is not None and _within(name, anatomy.head.fqn)}
        before = learning - inside - later - head - {f"{anatomy.final_norm}.weight"}
        again = getattr(installed(model.get_submodule(block.fqn)), "again", False)
        for experts in (one for one in anatomy.experts if one.block == block.index):
            stacks = of_experts(anatomy, experts)
            own = {name for name in inside if _within(name, experts.fqn)}
            after = {name for name in inside if block.mlp is not None and _within(name, block.mlp)}
            rows = bool(before or inside - own - after)
            found.append(
                Dispatch(
                    ranks=view["expert"].size(),
                    experts=experts.number,
                    choices=choices,
                    row=stacks[0].inputs * dtype.itemsize,
                    result=stacks[-1].outputs * dtype.itemsize,
                    forwards=2 if again and (before or inside) else 1,
                    rows_learn=rows,
                    results_learn=rows or bool(own),
                )
            )
    return tuple(found)


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")
