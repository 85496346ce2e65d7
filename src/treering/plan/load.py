"""Plain tensors in: whole rows into plain parameters, and through the chain of parts into techniques' own tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.errors import PlanError
from treering.core.full_precision import exactly
from treering.core.sharded import local_rows, put, put_rows
from treering.plan.prepared import Prepared, digest, key
from treering.technique import LazyTensor, Part
from treering.weights.plain_tensors import Source, plain_tensors

if TYPE_CHECKING:
    from torch import nn

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
    def cost(self) -> float:
        return sum(part.cost for part in self.parts)


@torch.no_grad()
def fill(
    model: "nn.Module",
    source: Source,
    chains: Mapping[str, Chain],
    *,
    statistics: Statistics | None = None,
    prepared: Prepared | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Give every live parameter its first value. Returns what each chain loses, ‖join(split(W)) − W‖/‖W‖.

    `note` is given what a person should know, the same on every rank.
    """
    live = plain_tensors(model)
    lost = {}
    for group in source.groups:
        for name in group:
            chain = chains.get(name)
            if name in live and not (chain and chain.moves_base):
                put_rows(live[name], _rows(source.tensors[name], live[name]))
            if chain and not chain.reads:
                tensors = _split(chain, source.tensors[name], live, statistics)
                lost[name] = _addition(chain, tensors, source.tensors[name])
                for own, value in tensors.items():
                    put(live[own], value)
    reading = [c for c in chains.values() if c.reads]
    lost |= prepare(live, source, reading, statistics, prepared, note)
    if prepared is not None:
        for chain in reading:
            for own in _names(chain):
                start, stop = local_rows(live[own])
                put_rows(live[own], prepared.rows(prepared.results[chain.name], own, start, stop))
    refuse_inexact(chains, lost)
    return lost


def refuse_inexact(chains: Mapping[str, Chain], lost: Mapping[str, float]) -> None:
    """Raise PlanError for a weight that its parts do not reproduce to their tolerance."""
    for name, loss in lost.items():
        allowed = [part.tolerance for part in chains[name].parts]
        if None not in allowed and not loss <= sum(a for a in allowed if a is not None):
            raise PlanError(
                f"{name} is not reproduced by what was made of it: ‖join(split(W)) − W‖/‖W‖ is {loss:.2e}, "
                f"and at most {sum(a for a in allowed if a is not None):.2e} was promised"
            )


@torch.no_grad()
def refill(model: "nn.Module", source: Source, owned: Sequence[str], saved: Mapping[str, LazyTensor]) -> None:
    """Go on from a checkpoint: `owned` from what was saved, the rest from the source. Nothing is split again."""
    live = plain_tensors(model)
    mine = set(owned)
    for group in source.groups:
        for name in group:
            if name in live and name not in mine:
                put_rows(live[name], _rows(source.tensors[name], live[name]))
    for name in owned:
        put_rows(live[name], _rows(saved[name], live[name]))


def _rows(tensor: LazyTensor, target: Tensor) -> Tensor:
    return tensor.rows(*local_rows(target)) if target.ndim else tensor.read()


def _split(
    chain: Chain, weight: LazyTensor, live: Mapping[str, Tensor], statistics: Statistics | None
) -> dict[str, Tensor]:
    """All tensors of the chain, in the dtypes in which they will live."""
    tensors: dict[str, Tensor] = {}
    own_statistics = (statistics or {}).get(chain.name)

    def base() -> Tensor:
        if chain.name in tensors:
            return tensors[chain.name]
        whole = weight.read()
        return whole if chain.name in live else torch.zeros_like(whole)

    for position, part in enumerate(chain.parts):
        earlier = chain.parts[:position]

        def below(earlier: tuple[Part, ...] = earlier) -> Tensor:
            return join(earlier, tensors, base())

        with exactly():
            made = part.split(weight, below, own_statistics)
        for name, value in made.items():
            tensors[name] = value.to(live[name].dtype)
    return tensors


def join(parts: Sequence[Part], tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """The plain weight as `parts` reproduce it, at least in float32."""
    value = base.to(torch.promote_types(base.dtype, torch.float32))
    with exactly():
        for part in parts:
            value = part.join(tensors, value)
    return value


def _addition(chain: Chain, tensors: Mapping[str, Tensor], weight: LazyTensor) -> float:
    """What a start that never reads the weight adds to it; promised to be nothing unless it is an import."""
    if any(part.tolerance is None for part in chain.parts):
        return 0.0
    nothing = torch.zeros(()).expand(weight.shape)  # without memory: this must not be what loading peaks at
    return float(torch.linalg.vector_norm(join(chain.parts, tensors, nothing), float("inf")))


def prepare(
    live: Mapping[str, Tensor],
    source: Source,
    chains: Sequence[Chain],
    statistics: Statistics | None,
    prepared: Prepared | None,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Splits that cost something: shared out longest first, each made once, by one rank, and then in `prepared`, whose
    `results` name them. Without `prepared`, straight into the live tensors. Returns what each chain loses."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    if chains and world > 1 and prepared is None:
        raise PlanError("a folder for prepared tensors is needed, seen by all ranks: compose(…, prepared=DIR)")
    made: dict[str, tuple[str, float]] = {}
    problem = ""
    again: list[tuple[str, str]] = []  # the reason for making a result again, and the weight
    try:
        for chain in _deal(chains, world)[rank]:
            weight = source.tensors[chain.name]
            whole = weight.read()
            name = key(digest(whole), chain.identity, _identity(chain, live, statistics))
            if prepared is not None:
                wrong = prepared.problem(name, (*_names(chain), "lost"))
                if wrong == "":
                    made[chain.name] = name, float(prepared.rows(name, "lost", 0, 1))
                    continue
                if wrong:
                    again.append((wrong, f"{prepared.path(name)} of {chain.name}"))
            tensors = _split(chain, weight, live, statistics)
            base = tensors.get(chain.name, whole if chain.name in live else torch.zeros_like(whole))
            wide = whole.to(torch.promote_types(whole.dtype, torch.float32))
            norm = wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
            loss = float((join(chain.parts, tensors, base) - wide).norm() / norm)
            if prepared is None:
                for own, value in tensors.items():
                    put(live[own], value)
            else:
                prepared.write(name, tensors | {"lost": torch.tensor([loss], dtype=torch.float64)})
            made[chain.name] = name, loss
    except Exception as error:
        if world == 1:
            raise
        problem = f"rank {rank}: {type(error).__name__}: {error}"
    if world > 1:
        everyone: list[tuple[str, dict, list]] = [("", {}, [])] * world
        dist.all_gather_object(everyone, (problem, made, again))
        problems = [p for p, _, _ in everyone if p]
        if problems:
            raise PlanError(f"splitting failed on {problems[0]}")
        made = {name: value for _, part, _ in everyone for name, value in part.items()}
        again = [one for _, _, part in everyone for one in part]
    if again:
        reason, where = again[0]
        more = f", and {len(again) - 1} more" if len(again) > 1 else ""
        note(f"{len(again)} of {len(chains)} prepared results had to be made again: {where} was {reason}{more}")
    if prepared is not None:
        prepared.results |= {name: key for name, (key, _) in made.items()}
    return {name: loss for name, (_, loss) in made.items()}


def _identity(chain: Chain, live: Mapping[str, Tensor], statistics: Statistics | None) -> str:
    dtypes = [f"{n}:{live[n].dtype}" for n in _names(chain)]
    looked_at = any(part.measured for part in chain.parts)
    measured = (statistics or {}).get(chain.name, {}) if looked_at else {}
    return "\0".join([chain.name, *dtypes, *(f"{n}={digest(t)}" for n, t in sorted(measured.items()))])


def _names(chain: Chain) -> list[str]:
    """What splitting gives values to. A base that stays where it is comes straight from the source."""
    own = {name for part in chain.parts for name in part.names}
    return sorted(own | ({chain.name} if chain.moves_base else set()))


def _deal(chains: Sequence[Chain], ranks: int) -> list[list[Chain]]:
    """Longest first, each to the rank with the least so far."""
    hands: list[list[Chain]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for chain in sorted(chains, key=lambda c: (-c.cost, c.name)):
        least = load.index(min(load))
        hands[least].append(chain)
        load[least] += chain.cost
    return hands
