"""Treering: post-training for large transformers. Importing it costs milliseconds; torch comes with the first name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treering import curvature
    from treering.compile import Compile
    from treering.curvature import measure
    from treering.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        Interrupted,
        NumericsError,
        PlanError,
        RankLost,
        TreeringError,
    )
    from treering.full import Full
    from treering.lora import LoRA
    from treering.osft import OSFT
    from treering.plan.compose import compose
    from treering.plan.run import Run
    from treering.recompute import Recompute
    from treering.shard import Shard
    from treering.tiling import TiledBlock, TiledLoss, TiledMLP
    from treering.topology import mesh

_WHERE = {
    "Compile": "treering.compile",
    "Full": "treering.full",
    "LoRA": "treering.lora",
    "OSFT": "treering.osft",
    "Recompute": "treering.recompute",
    "Shard": "treering.shard",
    "TiledBlock": "treering.tiling",
    "TiledLoss": "treering.tiling",
    "TiledMLP": "treering.tiling",
    "measure": "treering.curvature",
    "mesh": "treering.topology",
    "Run": "treering.plan",
    "compose": "treering.plan",
    "TreeringError": "treering.errors",
    "ConfigError": "treering.errors",
    "PlanError": "treering.errors",
    "RankLost": "treering.errors",
    "DataError": "treering.errors",
    "CheckpointError": "treering.errors",
    "Interrupted": "treering.errors",
    "NumericsError": "treering.errors",
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
