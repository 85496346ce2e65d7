"""The parts of one plain tensor: from the weight to techniques' own tensors (split) and back (join)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treering.core.full_precision import full_precision
from treering.technique import LazyTensor, Part

Statistics = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The parts of one plain tensor, in stage order, and what their results depend on besides the weight."""

    name: str
    parts: tuple[Part, ...]
    identity: str

    @property
    def reads(self) -> bool:
        return any(part.reads_weight for part in self.parts)

    @property
    def moves_base(self) -> bool:
        return any(part.moves_base for part in self.parts)

    @property
    def independent_rows(self) -> bool:
        return all(part.independent_rows for part in self.parts)

    @property
    def cost(self) -> float:
        return sum(part.cost for part in self.parts)

    @property
    def names(self) -> list[str]:
        """What splitting gives values to. A base that stays where it is comes straight from the source."""
        own = {name for part in self.parts for name in part.names}
        return sorted(own | ({self.name} if self.moves_base else set()))


def split(
    chain: Chain, weight: LazyTensor, live: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return all tensors of the chain for `weight`, all rows or some of them, in the dtypes of the live tensors."""
    tensors: dict[str, Tensor] = {}

    def base() -> Tensor:
        if chain.name in tensors:
            return tensors[chain.name]
        plain = weight.read()
        return plain if chain.name in live else torch.zeros_like(plain)

    for position, part in enumerate(chain.parts):
        earlier = chain.parts[:position]

        def below(earlier: tuple[Part, ...] = earlier) -> Tensor:
            return join(earlier, tensors, base())

        with full_precision():
            values = part.split(weight, below, statistics)
        for name, value in values.items():
            tensors[name] = value.to(live[name].dtype)
    return tensors


def join(parts: Sequence[Part], tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Return the plain weight as `parts` reproduce it, at least in float32."""
    value = base.to(torch.promote_types(base.dtype, torch.float32))
    with full_precision():
        for part in parts:
            value = part.join(tensors, value)
    return value
