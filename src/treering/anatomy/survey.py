"""From a model to its anatomy: its parts, their blocks, and one role for every parameter."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from treering.anatomy.attention import read_attention
from treering.anatomy.blocks import Layout, is_norm, lay_out, within
from treering.anatomy.experts import is_experts, read_experts
from treering.anatomy.head import read_head
from treering.anatomy.parts import Anatomy, Experts, Head, Linear, Parameter, Role
from treering.anatomy.refuse import forced_roles, refuse_other_models, unassigned
from treering.anatomy.roles import embedding_modules, is_linear, role_of

_EMBEDDING_NORM = re.compile(r"emb|per_layer", re.I)


def survey(model: Any, overrides: Mapping[str, str]) -> Anatomy:
    """Return the anatomy of `model`; see `treering.anatomy.examine`."""
    refuse_other_models(model)
    forced = forced_roles(model, overrides)
    names = {id(p): name for name, p in model.named_parameters()}
    embeddings = embedding_modules(model)
    tokens = model.get_submodule(embeddings[0])
    head = read_head(model, {id(tokens.weight): names[id(tokens.weight)]}, names)
    layouts = lay_out(model, forced)
    attentions = tuple(
        read_attention(model, layout.block.attention, layout.block.index)
        for layout in layouts
        if layout.block.attention is not None
    )
    experts = _experts(model, layouts, forced)
    parameters = _parameters(model, layouts, experts, head, forced)
    norms = tuple(name for name, module in model.named_modules() if is_norm(name, module))
    return Anatomy(
        model_type=model.config.model_type,
        parameters=parameters,
        linears=tuple(_linears(model, layouts, parameters, names, head)),
        blocks=tuple(layout.block for layout in layouts),
        attentions=attentions,
        experts=experts,
        embeddings=tuple(name for name in embeddings if _block(name, layouts) is None),
        norms=norms,
        final_norm=_final_norm([n for n in norms if _block(n, layouts) is None]),
        head=head,
    )


def _experts(model: nn.Module, layouts: tuple[Layout, ...], forced: Mapping[str, Role]) -> tuple[Experts, ...]:
    every = []
    for layout in layouts:
        fqn, index = layout.block.fqn, layout.block.index
        for below, module in model.get_submodule(fqn).named_modules(prefix=fqn):
            inside = within(below, (*layout.attention_roots, *layout.mixer_roots))
            own = [f"{below}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if is_experts(below, module) and not inside and not any(name in forced for name in own):
                every.append(read_experts(model, below, fqn, index))
    return tuple(every)


def _parameters(
    model: Any, layouts: tuple[Layout, ...], experts: tuple[Experts, ...], head: Head, forced: Mapping[str, Role]
) -> dict[str, Parameter]:
    assigned, unknown = {}, []
    experts_at = {e.fqn: e for e in experts}
    routers = tuple(e.router for e in experts if e.router is not None)
    for name, p in model.named_parameters():
        holder = name.rpartition(".")[0]
        layout = _block(name, layouts)
        if name in forced:
            role: Role | None = forced[name]
        elif holder in experts_at:
            role = "experts"
        elif name == head.bias or (name == head.weight and head.tied_to is None):
            role = "head"
        else:
            role = role_of(name, p, model.get_submodule(holder), layout, routers)
        if role is None:
            unknown.append(name)
            continue
        block = layout.block.index if layout else None
        assigned[name] = Parameter(name=name, role=role, shape=tuple(p.shape), module=holder, block=block)
    if unknown:
        raise unassigned(model, unknown)
    return assigned


def _linears(
    model: nn.Module,
    layouts: tuple[Layout, ...],
    parameters: Mapping[str, Parameter],
    names: Mapping[int, str],
    head: Head,
) -> Iterator[Linear]:
    for fqn, module in model.named_modules():
        if not is_linear(module):
            continue
        layout = _block(fqn, layouts)
        rows, columns = module.weight.shape
        transposed = isinstance(module, Conv1D)
        weight = names[id(module.weight)]
        yield Linear(
            fqn=fqn,
            weight=weight,
            bias=names[id(module.bias)] if module.bias is not None else None,
            inputs=rows if transposed else columns,
            outputs=columns if transposed else rows,
            transposed=transposed,
            block=layout.block.index if layout else None,
            role="head" if fqn == head.fqn else parameters[weight].role,
        )


def _block(name: str, layouts: tuple[Layout, ...]) -> Layout | None:
    return next((layout for layout in layouts if within(name, (layout.block.fqn,))), None)


def _final_norm(outside: list[str]) -> str | None:
    """Return, of the norms outside the blocks, the one that does not belong to the embeddings; else None."""
    final = outside if len(outside) == 1 else [name for name in outside if not _EMBEDDING_NORM.search(name)]
    return final[0] if len(final) == 1 else None
