"""`communication: cached` of form `update`: rows travel to operators instead of operators to rows.

Each weight has one owner among the ranks that share its rows, which keeps what is held of it whole, and multiplies:

    gathered   (P − 1)/P · M k            numbers of the operator, however many ranks there are
    cached     2 (P − 1)/P · N M / P      of the rows, there and back

a pass, that each rank sends. In a round a rank owns at most one weight: one exchange brings the rows of all of the
round's weights to their owners, and another one brings them back. While it lasts, a rank has one weight whole, and
what becomes of it; for good, its share of the operators a second time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.sharded import local
from treering.techniques.osft.held import Held, Pair, project_all
from treering.techniques.osft.protection import End
from treering.techniques.osft.wire import groups


class Owners:
    """Who keeps what of `weights`, which are held by `held`. What is kept is made of the buffers of `held` at first
    use, is no part of any state, and is made again when those have been replaced or written to."""

    def __init__(self, held: Mapping[str, Held], weights: Mapping[str, Tensor]):
        self.held = held
        self._groups = {name: over[0] for name, over in _shared(held, weights).items()}
        self.owner: dict[str, int] = {}  # a rank in the weight's own group; the costliest weight first
        for group in dict.fromkeys(self._groups.values()):
            costs = {name: held[name].cost for name, of in self._groups.items() if of is group}
            self.owner |= deal(costs, dist.get_world_size(group))
        self._kept: dict[str, dict[End, Tensor]] = {}  # of this rank's own weights
        self._made_of: dict[str, list[tuple[Tensor, int]]] = {}  # buffers, and how often they had been written to

    @torch.no_grad()
    def project_all(self, pairs: Mapping[str, Pair]) -> None:
        """Each X becomes P_out X P_in. A collective; the same names on all ranks."""
        self._keep([name for name in pairs if name in self.owner])
        for names in self.rounds(pairs):
            trip = self._round({name: _Dealt(pairs[name].X, pairs[name].weight.shape[0]) for name in names})
            whole = trip.collect()
            if whole is not None:
                mine = self._mine(names)
                whole = self.held[mine].project_whole(whole, self._kept[mine])
            trip.deliver(whole)
        project_all(pair for name, pair in pairs.items() if name not in self.owner)

    def rounds(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Of those that travel: each rank owns at most one of a round; its costliest, then the next."""
        wanted = set(names)
        found: dict[tuple[Any, ...], list[str]] = {}
        taken: dict[tuple[Any, ...], int] = {}
        for name, owner in self.owner.items():
            if name in wanted:
                alike = self._groups[name], self.held[name].held("scale").dtype
                number = taken[alike, owner] = taken.get((alike, owner), -1) + 1
                found.setdefault((alike, number), []).append(name)
        yield from found.values()

    def _keep(self, names: Sequence[str]) -> None:
        # All ranks write to a buffer or none does, so they agree.
        stale = [name for name in names if not self._fits(name)]
        for name in stale:
            self._kept.pop(name, None)
        for end in ("in", "out"):
            for alike in self.rounds(name for name in stale if end in self.held[name].sides):
                trip = self._round({name: _Dealt.of(self._bases(name)[end]) for name in alike})
                if (whole := trip.collect()) is not None:
                    self._kept.setdefault(self._mine(alike), {})[end] = whole
        for name in stale:
            self._made_of[name] = [(buffer, local(buffer)._version) for buffer in self._bases(name).values()]

    def _fits(self, name: str) -> bool:
        made_of, now = self._made_of.get(name), self._bases(name).values()
        return made_of is not None and all(
            of is buffer and number == local(buffer)._version for (of, number), buffer in zip(made_of, now, strict=True)
        )

    def _round(self, parts: "Mapping[str, _Dealt]") -> "_Round":
        return _Round(self._groups[next(iter(parts))], {self.owner[name]: part for name, part in parts.items()})

    def _mine(self, names: Iterable[str]) -> str:
        """Which of a round is this rank's own."""
        return next(name for name in names if self.owner[name] == dist.get_rank(self._groups[name]))

    def _bases(self, name: str) -> dict[End, Tensor]:
        held = self.held[name]
        return {end: held.held(held.basis(end)) for end in held.sides}


def deal(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank of each name, the costliest name first, and each to the rank with the least so far."""
    load = [0] * ranks
    found = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        found[name] = load.index(min(load))
        load[found[name]] += costs[name]
    return found


def _shared(held: Mapping[str, Held], weights: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Those whose rows are on several ranks, with the groups of these. Experts are whole where they are."""
    return {
        name: over
        for name, weight in weights.items()
        if name in held and held[name].sides and weight.ndim == 2 and len(over := groups(weight)) == 1
    }


@dataclass(frozen=True)
class _Dealt:
    """This rank's rows of a matrix of `total`: as FSDP deals them, the last ranks have fewer or none."""

    rows: Tensor
    total: int

    @classmethod
    def of(cls, value: Tensor) -> "_Dealt":
        return cls(local(value), value.shape[0])

    def numbers(self, ranks: int) -> list[int]:
        """Of elements, on each rank."""
        each, width = -(-self.total // ranks), self.rows.shape[1]
        return [width * (min((rank + 1) * each, self.total) - min(rank * each, self.total)) for rank in range(ranks)]


class _Round:
    """Matrices of which each rank of `group` owns at most one: their rows to the owners, and back."""

    def __init__(self, group: Any, by_owner: Mapping[int, _Dealt]):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self.parts = [by_owner[owner] for owner in sorted(by_owner)]
        self.mine = by_owner.get(rank)
        self.out = [by_owner[r].rows.numel() if r in by_owner else 0 for r in range(ranks)]
        self.into = [0] * ranks if self.mine is None else self.mine.numbers(ranks)

    def collect(self) -> Tensor | None:
        """The whole matrix that is this rank's own."""
        rows = torch.cat([part.rows.reshape(-1) for part in self.parts])
        whole = rows.new_empty(sum(self.into))
        dist.all_to_all_single(whole, rows, self.into, self.out, group=self.group)
        return None if self.mine is None else whole.view(self.mine.total, -1)

    def deliver(self, whole: Tensor | None) -> None:
        """Rows of what has become of the matrices, in place of those that were sent."""
        rows = self.parts[0].rows.new_empty(sum(self.out))
        own = rows.new_empty(0) if whole is None else whole.reshape(-1)
        dist.all_to_all_single(rows, own, self.out, self.into, group=self.group)
        for part, back in zip(self.parts, rows.split([part.rows.numel() for part in self.parts])):
            part.rows.copy_(back.view_as(part.rows))


def rounds_of(owners: Owners, weights: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """Yield, for each round of a projection of `weights`, one of them and the bytes that this rank sends to others: its
    rows of their weights, and then the rows of its own weight."""
    for names in owners.rounds(weights):
        parts = {name: _Dealt.of(weights[name]) for name in names}
        trip, rank = owners._round(parts), dist.get_rank(owners._groups[names[0]])
        size = trip.parts[0].rows.itemsize
        yield weights[names[0]], (sum(trip.out) - trip.out[rank]) * size, (sum(trip.into) - trip.into[rank]) * size
