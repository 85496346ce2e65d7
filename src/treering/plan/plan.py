"""A model with its structure in place and no values yet: what every other file of this folder works on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.anatomy import Anatomy
from treering.core.errors import PlanError
from treering.core.sharded import settle
from treering.objectives import Objective
from treering.plan.chain import Chain
from treering.plan.conflicts import name_of
from treering.technique import Applied, Message, Technique, Workload
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
    plain: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype before anything was applied
    source: Source | None
    source_name: str
    folder: Path | None
    mesh: "DeviceMesh | None"
    device: torch.device
    seed: int
    objective: Objective
    unpackable: str | None = None  # why packed batches are refused
    restore: tuple[Callable[[], None], ...] = ()  # removes the packed attention

    def tokens(self, length: int) -> range:
        """Return which tokens of a row of `length` this rank computes."""
        share = range(length)
        for applied in self.applied:
            if applied.tokens is not None:
                own = applied.tokens(len(share))
                share = share[own.start : own.stop : own.step]
        return share

    def messages(self, work: Workload) -> list[tuple[str, Message]]:
        """Return the communication of this rank in a step of `work`, each with the name of its technique."""
        return [
            (name_of(technique), message)
            for technique, applied in zip(self.techniques, self.applied)
            if applied.messages is not None
            for message in applied.messages(work)
        ]

    def without(self) -> AbstractContextManager[None]:
        """Open a context in which the model computes as if nothing had been trained: see `Run.without`."""
        return without(tuple(zip(self.techniques, self.applied)))

    def live(self) -> dict[str, Tensor]:
        """Return every parameter and persistent buffer as this rank holds it, shards where it is sharded."""
        settle(self.model)
        return plain_tensors(self.model)

    @property
    def owned(self) -> tuple[str, ...]:
        """Live names whose value is not that of the source: what a checkpoint has to hold."""
        names = {name for applied in self.applied for name in applied.trainable}
        for plain_name, chain in self.chains.items():
            for part in chain.parts:
                names.update(part.names)
                if part.moves_base:
                    names.add(plain_name)
        return tuple(sorted(names))


@contextmanager
def without(applied: Sequence[tuple[Technique, Applied]]) -> Iterator[None]:
    """Compute as if `applied` were absent, without gradients. PlanError where one trains the plain weights."""
    for technique, one in applied:
        if one.trainable and one.without is None:
            raise PlanError(
                f"{name_of(technique)} trains weights that the model does not keep a copy of, so it cannot compute as "
                "it did before training; compose a second model with frozen=True"
            )
    with ExitStack() as stack:
        for _, one in applied:
            if one.without is not None:
                stack.enter_context(one.without())
        yield
