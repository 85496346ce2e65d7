"""A model with its structure in place and no values yet, and the chains of parts that its weights are stored in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.anatomy import Anatomy
from treering.core.errors import PlanError
from treering.core.full_precision import full_precision
from treering.core.sharded import settle
from treering.objectives import Objective
from treering.plan.conflicts import name_of
from treering.technique import Applied, LazyTensor, Maps, Message, Part, Technique, TrainedMatrix, Workload
from treering.weights.plain_tensors import Source, plain_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Statistics = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The parts of one plain tensor, in stage order, and what their results depend on besides the weight."""

    name: str
    parts: tuple[Part, ...]
    identity: str

    @property
    def reads(self) -> bool:
        """Whether the first value of any part depends on the weight."""
        return any(part.reads_weight for part in self.parts)

    @property
    def moves_base(self) -> bool:
        """Whether any part changes the plain weight at its start."""
        return any(part.moves_base for part in self.parts)

    @property
    def independent_rows(self) -> bool:
        """Whether each row of the weight can be split without the others."""
        return all(part.independent_rows for part in self.parts)

    @property
    def cost(self) -> float:
        """The relative cost of splitting the weight."""
        return sum(part.cost for part in self.parts)

    @property
    def names(self) -> list[str]:
        """The tensors that splitting gives values to. A base that no part changes is read from the source, and so are
        copies of its stored tensors."""
        part_names = {name for part in self.parts for name in part.names if name not in part.copies}
        return sorted(part_names | ({self.name} if self.moves_base else set()))


def split(
    chain: Chain, weight: LazyTensor, live: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return all tensors of the chain for `weight`, all rows or some of them, in the dtypes of the live tensors."""
    tensors: dict[str, Tensor] = {}

    def base() -> Tensor:
        if chain.name in tensors:
            return tensors[chain.name]
        return weight.read() if chain.name in live else torch.zeros(weight.shape, dtype=weight.dtype)

    for position, part in enumerate(chain.parts):
        if part.copies and not chain.reads:  # nobody needs them here: `copies` gives them their values
            continue
        earlier = chain.parts[:position]

        def below(earlier: tuple[Part, ...] = earlier) -> Tensor:
            return join(earlier, tensors, base())

        with full_precision():
            values = part.split(weight, below, statistics)
        for name, value in values.items():
            tensors[name] = value.to(live[name].dtype)
    return tensors


def copies(chains: Mapping[str, Chain], source: Source) -> dict[str, LazyTensor]:
    """Return the tensors of the source that parts keep as they are stored, by live name."""
    tensors: dict[str, LazyTensor] = {}
    for name, chain in chains.items():
        for part in chain.parts:
            if part.copies:
                stored = source.tensors[name].stored
                assert stored is not None, f"{name} is not stored quantized"
                tensors |= {live: stored.tensors[key] for live, key in part.copies.items()}
    return tensors


def join(parts: Sequence[Part], tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Return the plain weight as `parts` reproduce it, at least in float32."""
    value = base.to(torch.promote_types(base.dtype, torch.float32))
    with full_precision():
        for part in parts:
            value = part.join(tensors, value)
    return value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model with its techniques in place and without values.

    See `draft`; `load` gives it its values.
    """

    model: Any
    anatomy: Anatomy
    techniques: tuple[Technique, ...]  # resolved, in the order of application
    applied: tuple[Applied, ...]
    chains: Mapping[str, Chain]  # plain name -> how its value is stored
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
    notes: tuple[str, ...] = ()  # for the user, about the folder
    teacher: "Plan | None" = None  # frozen; None also where the model is its own teacher

    def tokens(self, number: int) -> tuple[range, ...]:
        """Return the ranges of a micro-batch's `number` tokens that this rank computes."""
        cutting = [applied.tokens for applied in self.applied if applied.tokens is not None]
        assert len(cutting) < 2, "claims let one technique cut rows"
        return cutting[0](number) if cutting else (range(number),)

    def messages(self, work: Workload) -> list[tuple[str, Message]]:
        """Return the communication of this rank in a step of `work`, each with the name of its technique. That of a
        teacher of its own has the name teacher."""
        taught = [] if self.teacher is None else [("teacher", message) for _, message in self.teacher.messages(work)]
        own_teacher = self.teacher is None and getattr(self.objective, "teacher", None) is not None
        work = replace(work, own_teacher=own_teacher)
        return taught + [
            (name_of(technique), message)
            for technique, applied in zip(self.techniques, self.applied)
            if applied.messages is not None
            for message in applied.messages(work)
        ]

    def maps(self) -> Maps | None:
        """Return the tensors that train, by the plain weight that each changes; None where nothing trains."""
        maps: dict[str, tuple[TrainedMatrix, ...]] = {}
        for applied in self.applied:
            for weight, matrices in applied.maps.items():
                maps[weight] = (*maps.get(weight, ()), *matrices)
        return maps if any(applied.trainable for applied in self.applied) else None

    def without(self) -> AbstractContextManager[None]:
        """Open a context in which the model computes as if nothing had been trained: see `Run.without`."""
        return without(tuple(zip(self.techniques, self.applied)))

    def live(self) -> dict[str, Tensor]:
        """Return every parameter and persistent buffer on this rank, shards where it is sharded."""
        settle(self.model)
        return plain_tensors(self.model)

    @property
    def owned(self) -> tuple[str, ...]:
        """Live names whose value is not that of the source, so that a checkpoint has to contain them."""
        names = {name for applied in self.applied for name in applied.trainable}
        for plain_name, chain in self.chains.items():
            for part in chain.parts:
                names.update(name for name in part.names if name not in part.copies)
                if part.moves_base or part.writes_base:
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
