"""Stacked experts and the router that sends tokens to them."""

import re
from typing import Any

from torch import nn

from treering.anatomy.parts import Experts
from treering.core.errors import PlanError

_ROUTER_NAME = re.compile(r"^(gate|router)$")
_ROUTER_CLASS = re.compile(r"router|topkgat", re.I)


def is_experts(fqn: str, module: nn.Module) -> bool:
    """Return whether `module` itself holds parameters with one slice an expert."""
    named = "expert" in type(module).__name__.lower() or "expert" in fqn.rpartition(".")[2].lower()
    return named and any(p.ndim == 3 for _, p in module.named_parameters(recurse=False))


def read_experts(model: Any, fqn: str, block_fqn: str, block: int) -> Experts:
    """Return the facts of one experts module. Parameters that are not stacked over its experts are a PlanError."""
    module: Any = model.get_submodule(fqn)
    own = dict(module.named_parameters(recurse=False))
    stacked = {name: p for name, p in own.items() if p.ndim == 3}
    number = next(iter(stacked.values())).shape[0]
    others = [f"{fqn}.{name}" for name, p in own.items() if p.shape[0] != number or p.ndim not in (2, 3)]
    if others:
        raise PlanError(
            f"{model.config.model_type}: {', '.join(others)} is not stacked over the {number} experts next to it. "
            f'Give it a role of its own:  model: {{roles: {{"*.{others[0].rpartition(".")[2]}": mlp}}}}'
        )
    fused = any("gate_up" in name for name in stacked)
    return Experts(
        fqn=fqn,
        block=block,
        number=number,
        stacked=tuple(f"{fqn}.{name}" for name in stacked),
        biases=tuple(f"{fqn}.{name}" for name, p in own.items() if p.ndim == 2),
        transposed=_transposed(model, fqn, stacked),
        gated=fused or any("gate" in name for name in stacked),
        fused=fused,
        interleaved=fused and not getattr(module, "is_concatenated", True),
        router=_router(model, fqn, block_fqn),
    )


def _transposed(model: Any, fqn: str, stacked: dict[str, nn.Parameter]) -> bool:
    """Return the module's attribute; else by the hidden width, if it is on one side only."""
    attribute = getattr(model.get_submodule(fqn), "is_transposed", None)
    if attribute is not None:
        return bool(attribute)
    hidden = model.config.hidden_size
    answers = set()
    for name, p in stacked.items():
        first, second = p.shape[1] == hidden, p.shape[2] == hidden
        if first != second:
            last = f"{fqn.rpartition('.')[2]}.{name}"
            answers.add(second if "down" in last or "output" in last else first)
    if len(answers) != 1:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in stacked.items())
        raise PlanError(
            f"{model.config.model_type}: it is not known which side of the weights of the experts {fqn} is the output "
            f'({shapes}; hidden width {hidden}). To leave them alone, write  model: {{roles: {{"{fqn}.*": other}}}}'
        )
    return answers.pop()


def _router(model: nn.Module, fqn: str, block_fqn: str) -> str | None:
    """Return the nearest module next to the experts, or next to a module around them, that is called a router."""
    above = fqn
    while above != block_fqn:
        above = above.rpartition(".")[0]
        for name, child in model.get_submodule(above).named_children():
            neighbour = f"{above}.{name}"
            is_router = _ROUTER_NAME.match(name) or _ROUTER_CLASS.search(type(child).__name__)
            if is_router and neighbour != fqn and not fqn.startswith(neighbour + "."):
                return neighbour
    return None
