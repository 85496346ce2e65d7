"""Can the documents of one row be kept apart in this model? Asked before any weight is read; the answer is a reason."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from treering.anatomy import Anatomy

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def packable(model: nn.Module, anatomy: "Anatomy | None" = None) -> str | None:
    """Why packing would mix documents or miss them in this model, by name; None if every document stays alone."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "_supports_attention_backend"):
        return f"{name} is not a transformers model"
    text = config.get_text_config()
    if config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        return f"{name} has cross-attention, which does not know documents"
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if foreign:
        return f"{name} has layers of the kind {', '.join(foreign)}, which carry one document into the next"
    if getattr(model, "_is_stateful", False):
        return f"{name} keeps a recurrent state, which carries one document into the next"
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            return f"{fqn} of {name} is a convolution over tokens, which reaches into the neighbouring document"
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        return f"{name} computes its attention itself instead of through transformers' AttentionInterface"
    if anatomy is not None:
        others = [i for i, block in enumerate(anatomy.blocks) if block.mixer != "attention"]
        if others:
            return f"block {others[0]} of {name} mixes tokens by something other than attention"
    return _lost_on_the_way(model)


def _lost_on_the_way(model: nn.Module) -> str | None:
    """`documents` reaches the attention only if every forward down to it hands on its keyword arguments."""
    attentions = [fqn for fqn, module in model.named_modules() if "attention_interface" in _receivers(type(module))]
    if not attentions:
        return f"{type(model).__name__} has no layer that calls transformers' attention interface"
    for fqn in attentions:
        if not getattr(model.get_submodule(fqn), "is_causal", True):
            return f"{fqn} of {type(model).__name__} is not causal"
        for above, module in _path(model, fqn):
            if not isinstance(module, nn.ModuleList | nn.ModuleDict) and not _receivers(type(module)):
                return f"{type(module).__name__} ({above or 'the model'}) does not hand its keyword arguments on"
    return None


def _path(model: nn.Module, fqn: str) -> Iterator[tuple[str, nn.Module]]:
    parts = fqn.split(".")
    for i in range(len(parts) + 1):
        name = ".".join(parts[:i])
        yield name, model.get_submodule(name)


@cache
def _receivers(kind: type[nn.Module]) -> frozenset[str]:
    """What a class's forward hands its `**kwargs` to: names as written, `self.model` or `attention_interface`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.args.kwarg is None:
        return frozenset()
    swallowed = function.args.kwarg.arg
    return frozenset(
        ast.unparse(call.func)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for word in call.keywords
        if word.arg is None and isinstance(word.value, ast.Name) and word.value.id == swallowed
    )
