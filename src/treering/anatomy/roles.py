"""The generic rules for the role of a parameter, the most certain ones first."""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from treering.anatomy.attention import is_sink
from treering.anatomy.blocks import Layout, is_norm, within
from treering.anatomy.parts import Role
from treering.core.errors import PlanError

_POSITION = re.compile(r"(^|[._])(w?pe|pos)([._]|$)|position", re.I)


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
