"""Treering: post-training for large transformers. Importing it costs milliseconds; torch comes with the first name."""

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
    from treering.plan.compose import compose
    from treering.plan.run import Run
    from treering.techniques.compile import Compile
    from treering.techniques.full import Full
    from treering.techniques.lora import LoRA
    from treering.techniques.osft import OSFT
    from treering.techniques.recompute import Recompute
    from treering.techniques.shard import Shard
    from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP

_WHERE = {
    "Compile": "treering.techniques.compile",
    "Full": "treering.techniques.full",
    "LoRA": "treering.techniques.lora",
    "OSFT": "treering.techniques.osft",
    "Recompute": "treering.techniques.recompute",
    "Shard": "treering.techniques.shard",
    "TiledBlock": "treering.techniques.tiling",
    "TiledLoss": "treering.techniques.tiling",
    "TiledMLP": "treering.techniques.tiling",
    "measure": "treering.curvature",
    "mesh": "treering.core.topology",
    "Run": "treering.plan",
    "compose": "treering.plan",
    "TreeringError": "treering.core.errors",
    "ConfigError": "treering.core.errors",
    "PlanError": "treering.core.errors",
    "RankLost": "treering.core.errors",
    "DataError": "treering.core.errors",
    "CheckpointError": "treering.core.errors",
    "Interrupted": "treering.core.errors",
    "NumericsError": "treering.core.errors",
}

__all__ = [
    "OSFT",
    "CheckpointError",
    "Compile",
    "ConfigError",
    "DataError",
    "Full",
    "Interrupted",
    "LoRA",
    "NumericsError",
    "PlanError",
    "RankLost",
    "Recompute",
    "Run",
    "Shard",
    "TiledBlock",
    "TiledLoss",
    "TiledMLP",
    "TreeringError",
    "compose",
    "curvature",
    "measure",
    "mesh",
]


def __getattr__(name: str) -> Any:
    if name == "curvature":  # a room as it is: its `open` and `add` are no names to stand alone
        return import_module("treering.curvature")
    if name not in _WHERE:
        raise AttributeError(f"treering has no {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
