"""`communication: cached` of form `update`: rows are sent to operators instead of operators to rows.

Each weight has one owner among the ranks that share its rows, which keeps its complete operators, and multiplies:

    gathered   (P − 1)/P · M k            numbers of the operator, however many ranks there are
    cached     2 (P − 1)/P · N M / P      of the rows, there and back

a pass, that each rank sends. In a round a rank owns at most one weight: one exchange sends the rows of all of the
round's weights to their owners, and another one returns them. During a round a rank holds one complete weight and its
projection; at all times, a second copy of its share of the operators.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.owners import MatrixRows, RowExchange, assign
from treering.core.sharded import Groups, TensorCache, row_groups
from treering.techniques.osft.protection.operators import End
from treering.techniques.osft.update.operator_buffers import OperatorBuffers, ProjectedRows, project_all


class CachedOperators:
    """The complete operators of the weights that this rank owns.

    They are gathered from the buffers of `operators` at first use, are no part of any state, and are gathered again
    when the buffers were replaced or written to.
    """

    def __init__(self, operators: Mapping[str, OperatorBuffers], weights: Mapping[str, Tensor]):
        self.operators, self.weights = operators, weights
        self._groups = {name: groups[0] for name, groups in _exchanged(operators, weights).items()}
        self.owner: dict[str, int] = {}  # a rank in the weight's own group; the costliest weight first
        for group in dict.fromkeys(self._groups.values()):
            costs = {name: float(operators[name].cost) for name, of in self._groups.items() if of is group}
            self.owner |= assign(costs, dist.get_world_size(group))
        self._cache = {name: TensorCache() for name in self.owner}  # of bases by end; empty for other ranks' weights

    @torch.no_grad()
    def project_all(self, tasks: Mapping[str, ProjectedRows]) -> None:
        """Replace each X by P_out X P_in. A collective; the same names on all ranks."""
        self._refresh([name for name in tasks if name in self.owner])
        for names in self.rounds(tasks):
            exchange = self._exchange({n: MatrixRows(tasks[n].X, tasks[n].weight.shape[0]) for n in names})
            complete = exchange.collect()
            if complete is not None:
                name = self._owned(names)
                complete = self.operators[name].project_complete(complete, self._cache[name].value)
            exchange.deliver(complete)
        project_all(task for name, task in tasks.items() if name not in self.owner)

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

    def exchanges(self, names: Iterable[str]) -> Iterator[tuple[Tensor, int, int]]:
        """Yield for each round of a projection: a weight of it, and the bytes that this rank sends to others: its rows
        of their weights, and then the rows of its own weight."""
        for round_ in self.rounds(names):
            exchange = self._exchange({n: MatrixRows.of(self.weights[n]) for n in round_})
            yield self.weights[round_[0]], *exchange.sent_bytes()

    def _refresh(self, names: Sequence[str]) -> None:
        stale = [name for name in names if not self._cache[name].valid(*self._bases(name).values())]
        complete: dict[str, dict[End, Tensor]] = {name: {} for name in stale}
        for name in stale:
            self._cache[name] = TensorCache()  # free the old ones first
        for end in ("in", "out"):
            for round_ in self.rounds(name for name in stale if end in self.operators[name].shapes):
                exchange = self._exchange({name: MatrixRows.of(self._bases(name)[end]) for name in round_})
                if (basis := exchange.collect()) is not None:
                    complete[self._owned(round_)][end] = basis
        for name in stale:
            self._cache[name].keep(complete[name], *self._bases(name).values())

    def _exchange(self, rows: Mapping[str, MatrixRows]) -> RowExchange:
        return RowExchange(self._groups[next(iter(rows))], {self.owner[name]: part for name, part in rows.items()})

    def _owned(self, names: Iterable[str]) -> str:
        """Return the name of a round that this rank owns."""
        return next(name for name in names if self.owner[name] == dist.get_rank(self._groups[name]))

    def _bases(self, name: str) -> dict[End, Tensor]:
        operators = self.operators[name]
        return {end: operators.buffer(operators.basis(end)) for end in operators.shapes}


def _exchanged(operators: Mapping[str, OperatorBuffers], weights: Mapping[str, Tensor]) -> dict[str, Groups]:
    """Return the process groups of the weights whose rows are on several ranks. Experts are complete on theirs."""
    return {
        name: groups
        for name, weight in weights.items()
        if name in operators and operators[name].shapes and weight.ndim == 2 and len(groups := row_groups(weight)) == 1
    }
