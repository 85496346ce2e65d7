"""The facts of a softmax attention, read from its module: heads, widths, window, softcap, sinks."""

import inspect
import re
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from treering.anatomy.parts import Attention
from treering.core.errors import PlanError

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "num_kv")
_HEAD_DIM = (
    "head_dim",
    "head_size",
    "qk_head_dim",
    "attn_head_size",
    "attention_head_size",
    "dim_head",
    "hidden_size_per_head",
)
_SOFTCAP = ("attn_logit_softcapping", "attn_logit_softcap")
_FUSED = re.compile(r"^(qkv_proj|query_key_value|c_attn|Wqkv|in_proj_qkv)$")
# Models with other settings: model type -> names of (the list of layer kinds, the kind that slides, the window).
_OTHER_SETTINGS = {"gpt_neo": ("attention_layers", "local", "window_size")}
# Classes in which tokens meet otherwise than by softmax attention over all allowed positions.
_SEQUENCE = re.compile(
    r"Mamba|SSM|Delta|Lightning|Linear_?Attention|Rwkv|Retention|R[gG][lL][rR][uU]|LSTM|Conv|Indexer|Compressor|ForgetGate"
)


def is_attention(module: nn.Module) -> bool:
    """Return whether this module itself computes softmax attention, by what its code does and not by its name alone."""
    if not re.search(r"atten|attn", type(module).__name__, re.I):
        return False
    return calls(type(module).forward, _INTERFACE) or _has_softmax(type(module))


def sequence_modules(block: nn.Module) -> list[str]:
    """Return the modules inside `block`, by their names there, in which tokens meet without softmax attention."""
    return [
        name
        for name, module in block.named_modules()
        if name and not isinstance(module, Conv1D) and not is_attention(module)
        if isinstance(module, nn.Conv1d) or _SEQUENCE.search(type(module).__name__)
    ]


def calls(function: Any, name: str) -> bool:
    """Return whether the code of `function` mentions the global or attribute `name`."""
    return any(name in code.co_names for code in _codes(function))


def names_in(function: Any) -> set[str]:
    """Return the globals and attributes that the code mentions, and short strings (`getattr(config, "x")`)."""
    names: set[str] = set()
    for code in _codes(function):
        names |= set(code.co_names) | {c for c in code.co_consts if isinstance(c, str) and len(c) < 48}
    return names


def read_attention(model: nn.Module, fqn: str, block: int) -> Attention:
    """Return the facts of one softmax attention. What is unreadable, or contradicts the projections, is a PlanError."""
    module: Any = model.get_submodule(fqn)
    config: Any = getattr(module, "config", None) or model.config
    latent = getattr(module, "kv_lora_rank", None) is not None
    heads = _number(module, _HEADS) or _number(config, _HEADS)
    head_dim = getattr(module, "qk_head_dim", None) if latent else _number(module, _HEAD_DIM)
    if head_dim is None and heads:
        head_dim = _number(config, _HEAD_DIM) or config.hidden_size // heads
    if not heads or not head_dim:
        raise _unreadable(
            model, fqn, "number and width of heads: the module has none of " + ", ".join(_HEADS + _HEAD_DIM)
        )
    kv_heads = heads if latent else _kv_heads(module, config, heads, head_dim)
    value_dim = _number(module, ("v_head_dim", "value_dim")) or head_dim
    if not latent:
        _check_shapes(model, fqn, heads, kv_heads, head_dim, value_dim)
    kind = _kind(config, block)
    return Attention(
        fqn=fqn,
        block=block,
        kind=kind,
        interface=calls(type(module).forward, _INTERFACE),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        sliding_window=_window(model, module, config, kind),
        softcap=_float(next((v for n in _SOFTCAP for o in (module, config) if (v := getattr(o, n, None))), None)),
        sinks=next((f"{fqn}.{n}" for n, p in module.named_parameters(recurse=False) if is_sink(n, p)), None),
    )


def is_sink(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter of an attention is its sinks, one number a head."""
    return "sink" in name and parameter.ndim == 1


def _kv_heads(module: Any, config: Any, heads: int, head_dim: int) -> int:
    """Return what the module's repeat factor gives, else its attribute, else its projections, else the config."""
    if groups := _number(module, ("num_key_value_groups",)):
        return heads // groups
    shown = _projections(module).get("k_proj", 0) // head_dim
    return _number(module, _KV_HEADS) or shown or _number(config, _KV_HEADS) or heads


def _check_shapes(model: nn.Module, fqn: str, heads: int, kv: int, dim: int, value_dim: int) -> None:
    """Compare with the projections: a wrong number of heads would not fail later, but compute something else."""
    both = kv * dim + kv * value_dim
    for name, outputs in _projections(model.get_submodule(fqn)).items():
        wanted = {"k_proj": kv * dim, "v_proj": kv * value_dim}.get(name, heads * dim + both)
        if outputs != wanted:
            expected = f"{heads} heads, {kv} key-value heads, widths {dim} and {value_dim} make {wanted} rows"
            raise _unreadable(model, fqn, f"its shape: {expected} of {name}, which has {outputs}")


def _projections(module: nn.Module) -> dict[str, int]:
    """Return the rows of the projections whose row count depends on the number of heads."""
    return {
        name: linear.nf if isinstance(linear, Conv1D) else linear.out_features
        for name, linear in module.named_children()
        if isinstance(linear, nn.Linear | Conv1D) and (name in ("k_proj", "v_proj") or _FUSED.match(name))
    }


def _kind(config: Any, block: int) -> str:
    if config.model_type in _OTHER_SETTINGS:
        layers, word, _ = _OTHER_SETTINGS[config.model_type]
        return "sliding_attention" if getattr(config, layers)[block] == word else "full_attention"
    kinds = getattr(config, "layer_types", None)
    return kinds[block] if kinds and block < len(kinds) else "full_attention"


def _window(model: Any, module: Any, config: Any, kind: str) -> int | None:
    """Return the window: the model makes masks from `layer_types` where a config has them, else from one window."""
    if config.model_type in _OTHER_SETTINGS:
        return getattr(config, _OTHER_SETTINGS[config.model_type][2]) if kind == "sliding_attention" else None
    of_module, common = getattr(module, "sliding_window", None), getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None):
        return (of_module or common) if kind.startswith("sliding") else None
    if hasattr(module, "sliding_window"):
        return of_module
    uses_window = any(calls(type(m).forward, "create_sliding_window_causal_mask") for m in (model, model.base_model))
    return common if uses_window else None


def _codes(function: Any) -> Iterator[CodeType]:
    todo = [getattr(inspect.unwrap(function), "__code__", None)]
    while todo:
        code = todo.pop()
        if code is not None:
            yield code
            todo += [c for c in code.co_consts if isinstance(c, CodeType)]


def _has_softmax(kind: type) -> bool:
    functions = [f for c in kind.__mro__ if c.__module__.startswith("transformers.models") for f in vars(c).values()]
    return any(calls(f, "softmax") or calls(f, "Softmax") for f in functions if inspect.isfunction(f))


def _number(thing: Any, names: tuple[str, ...]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(thing, n, None), int) and v > 0), None)


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _unreadable(model: Any, fqn: str, what: str) -> PlanError:
    kind, last = type(model.get_submodule(fqn)).__name__, fqn.rpartition(".")[2]
    return PlanError(
        f"{model.config.model_type}: the attention {fqn} ({kind}) is not readable: it does not show {what}. "
        f'To treat it as an unknown way of mixing tokens, write  model: {{roles: {{"*.{last}": mixer}}}}'
    )
