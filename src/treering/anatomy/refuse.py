"""Errors for models that cannot be used: the reason, and what to write instead."""

import difflib
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, cast

from torch import nn

from treering.anatomy.names import matches
from treering.anatomy.parts import ROLES, Role
from treering.core.errors import PlanError

_SENSES = re.compile(r"vision|image|audio|speech|video|vq", re.I)


def refuse_other_models(model: Any) -> None:
    """Raise a PlanError unless `model` is a causal language model over text tokens."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise PlanError(f"{type(model).__name__} is not a transformers model; give an AutoModelForCausalLM")
    asked = f"{config.model_type} ({type(model).__name__})"
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"{asked} is an encoder-decoder model; only causal language models (decoders) can be trained")
    senses = [name for name in getattr(config, "sub_configs", {}) if _SENSES.search(name)]
    senses += [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)][:1]
    if senses or model.main_input_name != "input_ids":
        other = ", ".join(senses) or f"main input {model.main_input_name}"
        raise PlanError(
            f"{asked} is not a text-only model: it has {other}. "
            "Save its language model as a folder of its own and give that one"
        )


def refuse_not_causal(model: Any, fqn: str) -> None:
    """Raise a PlanError where the attention `fqn` also sees later tokens."""
    if getattr(model.get_submodule(fqn), "is_causal", True) is False:
        raise PlanError(
            f"{model.config.model_type}: the attention {fqn} is not causal (is_causal is False); only causal "
            "language models can be trained. Some configs become causal with  is_decoder: true  in config.json"
        )


def forced_roles(model: nn.Module, overrides: Mapping[str, str]) -> dict[str, Role]:
    """Return the role by parameter name, from patterns that name parameters or any module around them; the last match
    counts."""
    forced: dict[str, Role] = {}
    for pattern, role in overrides.items():
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"model.roles: {pattern!r} has the role {role!r};{hint} roles are {', '.join(ROLES)}")
        names = [n for n, _ in model.named_parameters() if any(matches(above, pattern) for above in _prefixes(n))]
        if not names:
            some = next((name for name, _ in model.named_parameters()), "")
            raise PlanError(
                f"model.roles: {pattern!r} matches no parameter and no module; a parameter is e.g. {some!r}"
            )
        forced |= dict.fromkeys(names, cast(Role, role))
    return forced


def unassigned(model: Any, names: list[str]) -> PlanError:
    """Return the error for parameters without a role."""
    ends = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "*.", name) for name in names))
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    lines = ", ".join(f'"{end}": other' for end in ends[:3]) + (", ..." if len(ends) > 3 else "")
    return PlanError(
        f"{model.config.model_type}: no role was found for {listed}. "
        f"Give each one of the roles {', '.join(ROLES)}:  model: {{roles: {{{lines}}}}}"
    )


def _prefixes(name: str) -> list[str]:
    return list(accumulate(name.split("."), lambda above, part: f"{above}.{part}"))
