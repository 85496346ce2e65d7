"""Rows of tokens sent to the ranks that own their experts, and the results sent back.

Of E experts and P ranks of the axis `expert`, rank p owns experts p E/P to (p + 1) E/P. Tokens stay with their rank. Of
its S = tokens × choices rows, sorted by expert and so by owner, each rank

    counts      sends to each owner the numbers of rows for its experts             one message, P × E/P numbers
    rows        sends to each owner its rows                                        one message, S × width
    results     gets each row's result back, and weights and adds them itself       one message, S × width

and in the backward the gradients go the same ways: two messages. A rank that receives no row takes part with none.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from treering.core.module_forward import ModuleForward
from treering.core.row_messages import all_to_all_rows
from treering.experts.assigned import Arrivals, shown_local
from treering.experts.grouped_forward import GroupedForward
from treering.experts.routing import Routing, route


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertExchange:
    """How many rows go where in one forward.

    Attributes:
        sent, received: rows for, and from, each rank of the group.
        experts: [R] which of this rank's experts each received row is for, counted from the first that it owns.
        group: the name of the process group.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    experts: Tensor
    group: str

    @classmethod
    def of(cls, routing: Routing, group: Any) -> "ExpertExchange":
        """Return the exchange of the rows of `routing`, whose offsets are of all experts. A collective."""
        ranks, name = dist.get_world_size(group), group.group_name
        counts = torch.diff(routing.offsets, prepend=routing.offsets.new_zeros(1)).view(ranks, -1)
        arriving = all_to_all_rows(counts, [1] * ranks, [1] * ranks, name)
        each = counts.shape[1]
        if isinstance(counts, FakeTensor) or counts.is_meta:
            return cls._balanced(len(routing.order), ranks, each, counts.device, name)
        # One wait for the device: numbers of rows are sizes, which the host has to know.
        out, into = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
        which = torch.arange(each, device=counts.device).repeat(ranks)
        experts = which.repeat_interleave(arriving.reshape(-1), output_size=sum(into))
        return cls(sent=tuple(out), received=tuple(into), experts=experts, group=name)

    @classmethod
    def _balanced(cls, rows: int, ranks: int, each: int, device: torch.device, name: str) -> "ExpertExchange":
        """Return the exchange where memory is planned from shapes: as if each rank got equally many rows of each."""
        sent = tuple(rows // ranks + (rank < rows % ranks) for rank in range(ranks))
        received = (sent[0],) * ranks
        experts = torch.arange(each, device=device).repeat(-(-sum(received) // each))[: sum(received)]
        return cls(sent=sent, received=received, experts=experts, group=name)

    def to_owners(self, rows: Tensor) -> Tensor:
        """Return the rows that this rank's experts are to compute, of the rows [S, …] of its tokens. A collective."""
        return all_to_all_rows(rows, self.sent, self.received, self.group)

    def to_senders(self, rows: Tensor) -> Tensor:
        """Return the results of this rank's own rows, of the results [R, …] of those it received. A collective."""
        return all_to_all_rows(rows, self.received, self.sent, self.group)


class DispatchedExperts(ModuleForward):
    """Called in place of the forward of stacked experts of which this rank has some: exchange, compute, exchange.

    What computes in between, the grouped forward with all that is registered with it, in tiles or not, sees received
    rows as tokens of one choice, without weights, and the parameters of this rank's experts as plain tensors.

    Args:
        module: the experts module.
        grouped: its grouped forward.
        group: the process group of the axis `expert`.
        number: how many experts all ranks of the group have together.
    """

    def __init__(self, module: nn.Module, grouped: GroupedForward, group: Any, number: int):
        super().__init__(module)
        self.grouped, self.group, self.number = grouped, group, number
        each = number // dist.get_world_size(group)
        grouped.local, grouped.first = each, each * dist.get_rank(group)

    # The numbers of rows are values: nothing here can be part of a compiled graph.
    @torch.compiler.disable
    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = route(top_k_index, self.number)
        exchange = ExpertExchange.of(routing, self.group)
        rows = exchange.to_owners(hidden[routing.tokens])
        self.grouped.arrivals = self._arrivals(routing, exchange)
        unweighted = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
        try:
            with shown_local(self.module):
                out = self.call_former(rows, exchange.experts.unsqueeze(1), unweighted)
        finally:
            self.grouped.arrivals = None
        back = exchange.to_senders(out)
        weighted = back * top_k_weights.reshape(-1)[routing.order].unsqueeze(-1)
        return routing.combine(weighted).to(hidden.dtype)

    def _arrivals(self, routing: Routing, exchange: ExpertExchange) -> Arrivals | None:
        """Return which of the received rows count for observers; padding is known to the rank of the token only."""
        if not self.grouped.observers:
            return None
        real = self.grouped.observers[0].counted(len(routing.tokens) // routing.choices)
        every = torch.ones(len(routing.tokens), device=routing.tokens.device)
        mask = every if real is None else real[routing.tokens].float()
        return Arrivals(counted=exchange.to_owners(mask.unsqueeze(1)).squeeze(1) != 0)
