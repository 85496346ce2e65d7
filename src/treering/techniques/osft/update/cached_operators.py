"""`communication: cached` of form `update`: rows are sent to operators instead of operators to rows.

Each weight has one owner among the ranks that share its rows, which keeps its complete operators, and multiplies.
Weights that share their operators have the same owner. A rank sends, in a pass over weights of N × M that share them,

    gathered   (P − 1)/P · M k              numbers of the operator, however many ranks there are
    cached     2 (P − 1)/P · Σ N M / P      of the rows, there and back

In a round a rank owns at most one weight: one exchange sends the rows of all of the round's weights to their owners,
and another one returns them. During a round a rank holds one complete weight and its projection; at all times, a second
copy of its share of the operators.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.owners import MatrixRows, RowExchange, assign
from treering.core.sharded import Groups, TensorCache, row_groups
from treering.techniques.osft.update.operator_buffers import OperatorBuffers, ProjectedRows, project_all


class CachedOperators:
    """The complete operators of the weights that this rank owns.

    They are gathered from the buffers of `operators` at first use, are no part of any state, and are gathered again
    when the buffers were replaced or written to.
    """

    def __init__(self, operators: Mapping[str, OperatorBuffers], weights: Mapping[str, Tensor]):
        self.operators, self.weights = operators, weights
        self._groups = {name: groups[0] for name, groups in _exchanged(operators, weights).items()}
        self.owner: dict[str, int] = {}  # a rank in the weight's own group; the costliest first
        for group in dict.fromkeys(self._groups.values()):
            costs: dict[str, float] = {}
            for name in (name for name, of in self._groups.items() if of is group):
                costs[self._source(name)] = costs.get(self._source(name), 0.0) + operators[name].cost
            owners = assign(costs, dist.get_world_size(group))
            members = {source: [n for n in self._groups if self._source(n) == source] for source in owners}
            self.owner |= {name: owner for source, owner in owners.items() for name in members[source]}
        # Complete buffers by name, kept for the weight that stores them; empty for other ranks' weights.
        self._cache = {self._source(name): TensorCache() for name in self.owner}

    @torch.no_grad()
    def project_all(self, tasks: Mapping[str, ProjectedRows]) -> None:
        """Replace each X by P_out X P_in. A collective; the same names on all ranks."""
        owned = [name for name in tasks if name in self.owner]
        self._refresh({self._source(name) for name in owned})
        for names in self.rounds(owned):
            exchange = self._exchange({n: MatrixRows(tasks[n].X, tasks[n].weight.shape[0]) for n in names})
            complete = exchange.collect()
            if complete is not None:
                name = self._owned(names)
                bases = self._cache[self._source(name)].value
                complete = self.operators[name].project_complete(complete, bases)
            exchange.deliver(complete)
        project_all((task for name, task in tasks.items() if name not in owned))

    def rounds(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Yield the names that are exchanged together: of a round each rank owns at most one, its costliest first."""
        wanted = set(names)
        rounds: dict[tuple[object, ...], list[str]] = {}
        taken: dict[tuple[object, ...], int] = {}
        for name, owner in self.owner.items():
            if name in wanted:
                alike = self._groups[name], self.operators[name].buffer("scale").dtype
                number = taken[alike, owner] = taken.get((alike, owner), -1) + 1
                rounds.setdefault((alike, number), []).append(name)
        yield from rounds.values()

    def exchanges(self) -> Iterator[tuple[Tensor, int, int]]:
        """Yield for each round of a pass: a weight of it, and the bytes that this rank sends to others: its rows of
        their weights, and then the rows of its own weight."""
        for round_ in self.rounds(self.owner):
            exchange = self._exchange({n: MatrixRows.of(self.weights[n]) for n in round_})
            yield self.weights[round_[0]], *exchange.sent_bytes()

    def _refresh(self, sources: Collection[str]) -> None:
        kept = {name: cache for name, cache in self._cache.items() if name in sources}
        stale = [name for name, cache in kept.items() if not cache.valid(*self._bases(name).values())]
        complete: dict[str, dict[str, Tensor]] = {name: {} for name in stale}
        for name in stale:
            self._cache[name] = TensorCache()  # free the old ones first
        for buffer in sorted({buffer for name in stale for buffer in self._bases(name)}):
            for round_ in self.rounds(name for name in stale if buffer in self._bases(name)):
                exchange = self._exchange({name: MatrixRows.of(self._bases(name)[buffer]) for name in round_})
                if (basis := exchange.collect()) is not None:
                    complete[self._owned(round_)][buffer] = basis
        for name in stale:
            self._cache[name].keep(complete[name], *self._bases(name).values())

    def _exchange(self, rows: Mapping[str, MatrixRows]) -> RowExchange:
        return RowExchange(self._groups[next(iter(rows))], {self.owner[name]: part for name, part in rows.items()})

    def _owned(self, names: Iterable[str]) -> str:
        """Return the name of a round that this rank owns."""
        return next(name for name in names if self.owner[name] == dist.get_rank(self._groups[name]))

    def _source(self, name: str) -> str:
        """Return the weight that stores the operators of the weight `name`."""
        return self.operators[name].source.matrix.weight

    def _bases(self, name: str) -> dict[str, Tensor]:
        operators = self.operators[name]
        return {basis: operators.buffer(basis) for basis in map(operators.basis, operators.shapes)}


def _exchanged(operators: Mapping[str, OperatorBuffers], weights: Mapping[str, Tensor]) -> dict[str, Groups]:
    """Return the process groups of the weights whose rows are on several ranks. Experts are complete on theirs."""
    return {
        name: groups
        for name, weight in weights.items()
        if name in operators and operators[name].shapes and weight.ndim == 2 and len(groups := row_groups(weight)) == 1
    }
