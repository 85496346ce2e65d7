"""From a model to its anatomy: its parts, their blocks, and one role for every parameter."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from treering.anatomy.attention import is_sink, names_in, read_attention
from treering.anatomy.blocks import Layout, is_experts, is_norm, lay_out, read_experts, within
from treering.anatomy.parts import Anatomy, Experts, Head, Linear, Parameter, Role
from treering.anatomy.refuse import forced_roles, refuse_other_models, unassigned
from treering.core.errors import PlanError

_EMBEDDING_NORM = re.compile(r"emb|per_layer", re.I)
_POSITION = re.compile(r"(^|[._])(w?pe|pos)([._]|$)|position", re.I)
# Generic rules do not show whether a setting multiplies or divides; this is what is known per name ...
_MULTIPLIES = ("logit_scale", "lm_head_multiplier")
_DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# ... and per model type, where a model gives a name another meaning.
_DIFFERENT = {"hyperclovax": {"logits_scaling": "multiplies"}}
_SUSPECT = re.compile(r"scal|cap|mult|temper|logits?_bias|mup", re.I)
_HARMLESS = {"soft_cap"}  # a function, next to the setting that it is given


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
            parameters = [f"{below}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if is_experts(below, module) and not inside and not any(name in forced for name in parameters):
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


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an affine map and nothing else; a subclass of Linear with another forward is not."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def embedding_modules(model: Any) -> tuple[str, ...]:
    """Return every embedding: that of the tokens first, then the others in order."""
    module = model.get_input_embeddings()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    below = [name for name in names if model.get_submodule(name) in list(getattr(module, "modules", list)())]
    if len(below) != 1:
        raise PlanError(
            f"{model.config.model_type}: {len(below)} token embeddings were found in {type(model).__name__} "
            f"(get_input_embeddings() gave {type(module).__name__}); such a model cannot be used"
        )
    return (*below, *(name for name in names if name not in below))


def role_of(
    name: str, parameter: nn.Parameter, holder: nn.Module, layout: Layout | None, routers: tuple[str, ...]
) -> Role | None:
    """Return the role by the generic rules; None where none applies."""
    module, _, leaf = name.rpartition(".")
    if isinstance(holder, nn.Embedding):
        return "position" if _POSITION.search(module) else "embedding"
    if layout is not None and within(module, layout.attention_roots) and is_sink(leaf, parameter):
        return "sink"
    if is_norm(module, holder):
        return "norm"
    if within(module, routers):
        return "router"
    if layout is None:
        return "position" if _POSITION.search(leaf) else None
    if within(module, layout.attention_roots):
        return "attention"
    if within(module, layout.mixer_roots):
        return "mixer"
    if within(module, layout.mlp_roots) or isinstance(holder, nn.Linear | Conv1D):
        return "mlp"
    return None


def read_head(model: Any, shared: dict[int, str], parameters: dict[int, str]) -> Head:
    """Return the facts of the head. `shared`: id of the embedding's parameter -> its name; `parameters`: of any."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise PlanError(
            f"{model.config.model_type}: {type(model).__name__} has no linear head (get_output_embeddings() gave "
            f"{type(module).__name__}); only causal language models can be trained"
        )
    fqn = next(name for name, m in model.named_modules() if m is module)
    scale, softcap, unknown = 1.0, None, []
    for name in sorted(n for n in names_in(type(model).forward) if _SUSPECT.search(n) and n not in _HARMLESS):
        value = getattr(model.config, name, None)
        effect = _DIFFERENT.get(model.config.model_type, {}).get(name)
        if name in _CAPS:
            softcap = float(value) if value is not None else None
        elif value is None:
            unknown.append(name)
        elif effect == "multiplies" or (effect is None and name in _MULTIPLIES):
            scale *= float(value)
        elif name in _DIVIDES:
            scale /= float(value)
        else:
            unknown.append(name)
    return Head(
        fqn=fqn,
        weight=parameters[id(module.weight)],
        bias=parameters[id(module.bias)] if module.bias is not None else None,
        tied_to=shared.get(id(module.weight)),
        scale=scale,
        softcap=softcap,
        unknown=tuple(unknown),
    )
