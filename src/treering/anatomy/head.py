"""The head and what a model's forward does to its logits after it."""

import re
from typing import Any

from torch import nn

from treering.anatomy.attention import names_in
from treering.anatomy.parts import Head
from treering.core.errors import PlanError

# Generic rules do not show whether a setting multiplies or divides; this is what is known per name ...
_MULTIPLIES = ("logit_scale", "lm_head_multiplier")
_DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# ... and per model type, where a model gives a name another meaning.
_DIFFERENT = {"hyperclovax": {"logits_scaling": "multiplies"}}

_SUSPECT = re.compile(r"scal|cap|mult|temper|logits?_bias|mup", re.I)
_HARMLESS = {"soft_cap"}  # a function, beside the setting that it is given


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
