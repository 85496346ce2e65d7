"""Treering: post-training for large transformers. Importing it costs milliseconds; torch comes with the first name.

The techniques are those of `treering.techniques`.
"""

# ruff: noqa: F401
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treering import curvature
    from treering.core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        Interrupted,
        NumericsError,
        PlanError,
        RankLost,
        TreeringError,
    )
    from treering.core.topology import mesh
    from treering.curvature import measure
    from treering.objectives import Distill
    from treering.plan.compose import compose
    from treering.plan.run import Run
    from treering.techniques import *  # noqa: F403
    from treering.techniques.ulysses.sequence_attention import sequence_attention

_WHERE = {
    "measure": "treering.curvature",
    "mesh": "treering.core.topology",
    "Run": "treering.plan",
    "compose": "treering.plan",
    "TreeringError": "treering.core.errors",
    "ConfigError": "treering.core.errors",
    "PlanError": "treering.core.errors",
    "RankLost": "treering.core.errors",
    "DataError": "treering.core.errors",
    "Distill": "treering.objectives",
    "sequence_attention": "treering.techniques.ulysses.sequence_attention",
    "CheckpointError": "treering.core.errors",
    "Interrupted": "treering.core.errors",
    "NumericsError": "treering.core.errors",
}


def _techniques() -> dict[str, Any]:
    return {cls.__name__: cls for cls in import_module("treering.techniques").TECHNIQUES.values()}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_WHERE, *_techniques(), "curvature"])
    if name == "curvature":  # the package itself: its `open` and `add` are no names to stand alone
        return import_module("treering.curvature")
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
    elif name.startswith("_") or (value := _techniques().get(name)) is None:
        raise AttributeError(f"treering has no {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__getattr__("__all__"), "__version__"])
