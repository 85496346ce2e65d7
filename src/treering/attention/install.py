"""Install packed attention on one model, and undo it; models in which documents cannot be kept apart are refused.

Whether a model can is decided before any weight is read.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from treering.core.errors import PlanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from treering.anatomy import Anatomy

NAME = "treering"
REGISTERED = "_treering_attention"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def install(model: nn.Module, anatomy: "Anatomy | None" = None) -> Callable[[], None]:
    """Make `model(input_ids, documents=...)` keep documents apart; without `documents` nothing changes. Returns undo.

    A configuration object may belong to several models, so this model's modules get a copy of theirs; undo
    restores the original objects.
    """
    from transformers import PretrainedConfig

    reason = packable(model, anatomy)
    if reason:
        raise PlanError(f"packing was asked for, but {reason}; switch packing off (data: packing: off)")
    configurations = [
        (module, attribute, value)
        for module in model.modules()
        for attribute, value in vars(module).items()
        if isinstance(value, PretrainedConfig)
    ]
    registered = vars(model)[REGISTERED] = Registered()
    seen: dict[int, object] = {}  # one memo for all: configurations inside configurations stay the same object
    for module, attribute, value in configurations:
        copied = copy.deepcopy(value, seen)
        copied._attn_implementation = NAME
        setattr(module, attribute, copied)

    def undo() -> None:
        for module, attribute, value in configurations:
            setattr(module, attribute, value)
        if vars(model).get(REGISTERED) is registered:
            del vars(model)[REGISTERED]

    return undo


class Registered:
    """Registers the attention with transformers under its name. It is an attribute of the model, so that reading a
    pickle of the model, perhaps in another process, registers it too."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        from treering.attention.hook import attention, deferred_mask

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, deferred_mask)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Registered, ()


def packable(model: nn.Module, anatomy: "Anatomy | None" = None) -> str | None:
    """Return why packing would mix documents or lose them in this model; None if it does neither."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "_supports_attention_backend"):
        return f"{name} is not a transformers model"
    text = config.get_text_config()
    if config.is_encoder_decoder or _crosses(text):
        return f"{name} has cross-attention, which does not separate documents"
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if foreign:
        return f"{name} has layers of the kind {', '.join(foreign)}, which cannot keep documents apart"
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a recurrent state from one document into the next"
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            return f"{fqn} of {name} is a convolution over tokens, which reaches into the neighbouring document"
    transformer: Any = model
    if not transformer._supports_attention_backend or not transformer._can_set_attn_implementation():
        return f"{name} computes its attention itself instead of through transformers' AttentionInterface"
    if anatomy is not None:
        others = [i for i, block in enumerate(anatomy.blocks) if block.mixer != "attention"]
        if others:
            return f"block {others[0]} of {name} mixes tokens by something other than attention"
    return _keywords_lost(model)


def _crosses(config: "PretrainedConfig") -> bool:
    return bool(getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_layers", None))


def _keywords_lost(model: nn.Module) -> str | None:
    """Return which module keeps `documents` from the attention: every forward above it has to pass on its keywords."""
    attentions = [fqn for fqn, module in model.named_modules() if "attention_interface" in _receivers(_kind(module))]
    if not attentions:
        return f"{type(model).__name__} has no layer that calls transformers' attention interface"
    for fqn in attentions:
        if not getattr(model.get_submodule(fqn), "is_causal", True):
            return f"{fqn} of {type(model).__name__} is not causal"
        if "arange" in _called(_kind(model.get_submodule(fqn))):
            return f"{fqn} of {type(model).__name__} counts positions itself, from the first token that it is given"
        if _looks_into_mask(_kind(model.get_submodule(fqn))):
            return f"{fqn} of {type(model).__name__} computes with its mask, and packing makes none"
        for above, module in _path(model, fqn):
            if not isinstance(module, nn.ModuleList | nn.ModuleDict) and not _receivers(_kind(module)):
                return f"{type(module).__name__} ({above or 'the model'}) does not pass on its keyword arguments"
    return None


def _path(model: nn.Module, fqn: str) -> Iterator[tuple[str, nn.Module]]:
    parts = fqn.split(".")
    for i in range(len(parts) + 1):
        name = ".".join(parts[:i])
        yield name, model.get_submodule(name)


def _kind(module: nn.Module) -> Any:
    """Return the class of `module`. Any, because type checkers do not take classes for hashable."""
    return type(module)


@cache
def _receivers(kind: type[nn.Module]) -> frozenset[str]:
    """Return what a class's forward passes its `**kwargs` to, as written: `self.model` or `attention_interface`."""
    function = _parsed(inspect.unwrap(kind.forward))
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


@cache
def _called(kind: type[nn.Module]) -> frozenset[str]:
    """Return the last names of all functions that the forward of a class calls: `arange` of `torch.arange(…)`."""
    calls = [node.func for node in ast.walk(_parsed(inspect.unwrap(kind.forward))) if isinstance(node, ast.Call)]
    return frozenset(ast.unparse(call).rpartition(".")[2] for call in calls)


@cache
def _looks_into_mask(kind: type[nn.Module]) -> bool:
    """Return whether a layer reads elements or properties of its mask, instead of only passing it on."""
    return any(
        isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "attention_mask"
        for node in ast.walk(_parsed(kind))
    )


def _parsed(thing: Callable[..., object]) -> ast.AST:
    """Return the syntax tree of a class or function; an empty module where its source is not available."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])
