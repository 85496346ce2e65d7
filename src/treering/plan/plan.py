"""A model with its structure in place and no values yet: what every other file of this folder is about."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.anatomy import Anatomy
from treering.core.sharded import settle
from treering.core.topology import axis_size
from treering.objectives import Objective
from treering.plan.load import Chain
from treering.technique import Applied, Technique
from treering.weights.plain_tensors import Source, plain_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model with its structure in place and no values yet."""

    model: Any
    anatomy: Anatomy
    techniques: tuple[Technique, ...]  # resolved, in the order of application
    applied: tuple[Applied, ...]
    chains: Mapping[str, Chain]  # plain name -> how its value is held
    plain: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # what there was before anything was applied
    source: Source | None
    source_name: str
    folder: Path | None
    mesh: "DeviceMesh | None"
    device: torch.device
    seed: int
    objective: Objective
    unpackable: str | None = None  # why packed batches are refused
    restore: tuple[Callable[[], None], ...] = ()  # what takes the packed attention off again

    @property
    def data_ranks(self) -> int:
        """How many sets of documents are trained on at once."""
        return axis_size(self.mesh, "replicate", "shard")

    def live(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer as it is held now, shards where it is sharded."""
        settle(self.model)
        return plain_tensors(self.model)

    @property
    def owned(self) -> tuple[str, ...]:
        """Live names whose value is not simply the source's: what a checkpoint has to hold."""
        names = {name for applied in self.applied for name in applied.trainable}
        for plain_name, chain in self.chains.items():
            for part in chain.parts:
                names.update(part.names)
                if part.moves_base:
                    names.add(plain_name)
        return tuple(sorted(names))
