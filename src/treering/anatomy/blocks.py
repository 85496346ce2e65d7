"""The stack of blocks of a model, and the parts of a block: attention, feed-forward part, experts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from treering.anatomy.attention import is_attention, sequence_modules
from treering.anatomy.parts import Block, Experts, Role
from treering.anatomy.refuse import refuse_not_causal
from treering.core.errors import PlanError

_ATTENTION_CLASS = re.compile(r"atten|attn", re.I)
_ACROSS = re.compile(r"cross|encoder_attn|encdec", re.I)
_MLP_NAME = re.compile(r"^(mlp|feed_?forward|ff|ffn|moe|block_sparse_moe|shared_mlp|shared_experts?|experts)$", re.I)
_MLP_CLASS = re.compile(r"mlp|moe|feed_?forward|ffn", re.I)
_ROUTER_NAME = re.compile(r"^(gate|router)$")
_ROUTER_CLASS = re.compile(r"router|topkgat", re.I)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A block and the modules whose parameters go with its attention, its feed-forward part, its other mixers."""

    block: Block
    attention_roots: tuple[str, ...]
    mlp_roots: tuple[str, ...]
    mixer_roots: tuple[str, ...]


def lay_out(model: nn.Module, forced: Mapping[str, Role]) -> tuple[Layout, ...]:
    """Return the layout of every block. `forced`: the role of parameters that the user gave one."""
    fqn, layers = _stack(model)
    return tuple(_layout(model, f"{fqn}.{i}", i, forced) for i in range(len(layers)))


def body(model: Any) -> nn.Module:
    """Return the module that gives the head's input: the base model. Where transformers has none (its prefix names a
    module that a text-only class does not have), the child that holds the blocks."""
    base: nn.Module = model.base_model
    if base is not model:
        return base
    fqn, _ = _stack(model)
    return model.get_submodule(fqn.partition(".")[0])


def is_norm(fqn: str, module: nn.Module) -> bool:
    """Return whether a module is called a norm, by its class or its name, and has at most small parameters."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.ModuleList) or next(module.children(), None) is not None:
        return False
    named = "norm" in type(module).__name__.lower() or "norm" in fqn.rpartition(".")[2].lower()
    return named and all(p.ndim <= 2 for p in module.parameters()) and not isinstance(module, nn.Identity)


def _stack(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the outermost module list with attention in it; of several, or without any attention, the longest."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{o}.") for o, _ in lists):
            lists.append((name, module))
    if not lists:
        raise PlanError(
            f"{model.config.model_type}: no list of blocks was found in {type(model).__name__} (an nn.ModuleList whose "
            "items contain attention); such a model cannot be used"
        )
    return max(lists, key=lambda item: (any(map(is_attention, item[1].modules())), len(item[1])))


def _layout(model: Any, fqn: str, index: int, forced: Mapping[str, Role]) -> Layout:
    block = model.get_submodule(fqn)
    attentions = _attentions(model, fqn, forced)
    roots = tuple(_topmost(model, fqn, name) for name in attentions)
    others = [f"{fqn}.{name}" for name in sequence_modules(block) if not is_norm(name, block.get_submodule(name))]
    mixer_roots = tuple(dict.fromkeys(_child(fqn, name, roots) for name in others if not within(name, roots)))
    children = [name for name, _ in block.named_children() if f"{fqn}.{name}" not in (*roots, *mixer_roots)]
    mlps = tuple(f"{fqn}.{name}" for name in children if _is_mlp(name, block.get_submodule(name)))
    if others:
        mixer_class = type(model.get_submodule((*mixer_roots, *others)[0])).__name__
    else:
        mixer_class = type(model.get_submodule(attentions[0]) if attentions else block).__name__
    return Layout(
        block=Block(
            fqn=fqn,
            index=index,
            attention=attentions[0] if attentions else None,
            mlp=mlps[0] if len(mlps) == 1 else None,
            mixer="attention" if attentions and not others else "other",
            mixer_class=mixer_class,
        ),
        attention_roots=roots,
        mlp_roots=mlps,
        mixer_roots=mixer_roots,
    )


def _attentions(model: Any, fqn: str, forced: Mapping[str, Role]) -> list[str]:
    """Return the softmax attention of a block, without what the user gave another role."""
    attentions = [
        name
        for name, module in model.get_submodule(fqn).named_modules(prefix=fqn)
        if is_attention(module) and not any(f"{name}.{p}" in forced for p, _ in module.named_parameters())
    ]
    across = [name for name in attentions if _ACROSS.search(name.removeprefix(fqn))]
    if across:
        raise PlanError(
            f"{model.config.model_type}: {across[0]} attends to something besides the tokens so far (an encoder, an "
            "image); encoder-decoder and multimodal models cannot be used, only causal language models"
        )
    if len(attentions) > 1:
        last = attentions[-1].removeprefix(f"{fqn}.")
        raise PlanError(
            f"{model.config.model_type}: the block {fqn} has {len(attentions)} attentions ({', '.join(attentions)}); "
            "only one is understood. "
            f'To treat one as an unknown way of mixing tokens, write  model: {{roles: {{"*.{last}": mixer}}}}'
        )
    for attention in attentions:
        refuse_not_causal(model, attention)
    return attentions


def _topmost(model: nn.Module, block: str, fqn: str) -> str:
    """Return the outermost module called attention around an attention: it may hold the output projection."""
    top = above = fqn
    while (above := above.rpartition(".")[0]) != block:
        if _ATTENTION_CLASS.search(type(model.get_submodule(above)).__name__):
            top = above
    return top


def _child(block: str, fqn: str, attentions: tuple[str, ...]) -> str:
    """Return the block's direct child around `fqn`, unless it contains attention as well."""
    child = f"{block}.{fqn.removeprefix(block + '.').partition('.')[0]}"
    return fqn if any(within(a, (child,)) for a in attentions) else child


def _is_mlp(name: str, module: nn.Module) -> bool:
    if is_norm(name, module) or next(module.parameters(), None) is None:
        return False
    return bool(_MLP_NAME.match(name) or _MLP_CLASS.search(type(module).__name__))


def within(name: str, roots: tuple[str, ...]) -> bool:
    """Return whether `name` is one of `roots` or lies below one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_experts(fqn: str, module: nn.Module) -> bool:
    """Return whether `module` itself holds parameters with one slice an expert."""
    named = "expert" in type(module).__name__.lower() or "expert" in fqn.rpartition(".")[2].lower()
    return named and any(p.ndim == 3 for _, p in module.named_parameters(recurse=False))


def read_experts(model: Any, fqn: str, block_fqn: str, block: int) -> Experts:
    """Return the facts of one experts module. Parameters that are not stacked over its experts are a PlanError."""
    module: Any = model.get_submodule(fqn)
    parameters = dict(module.named_parameters(recurse=False))
    stacked = {name: p for name, p in parameters.items() if p.ndim == 3}
    number = next(iter(stacked.values())).shape[0]
    others = [f"{fqn}.{name}" for name, p in parameters.items() if p.shape[0] != number or p.ndim not in (2, 3)]
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
        biases=tuple(f"{fqn}.{name}" for name, p in parameters.items() if p.ndim == 2),
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
