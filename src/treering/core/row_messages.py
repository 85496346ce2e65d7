"""Rows that ranks send one another, as out-of-place operators with names of their own.

A selective recompute keeps results of an operator by its name, where it would silently repeat an operator of c10d, and
refuse one that fills a tensor; and shapes alone are enough to plan its memory.

    all_to_all_rows        one collective
    all_to_all_in_pairs    the same result by rounds of one send and one receive, for hosts whose cards cannot reach
                           one another directly: there a collective lets many messages share the way through the host
    all_gather_rows        the rows of all ranks, on each
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from treering.core.pairing import partner, rounds

Transport = Literal["collective", "paired"]


@dataclass(kw_only=True)
class MessageRecord:
    """What this process has given to the operators below inside `recorded`.

    Attributes:
        calls: How often each operator ran.
        bytes: Bytes for other ranks, by operator.
    """

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, operator: str, size: int) -> None:
        self.calls[operator] = self.calls.get(operator, 0) + 1
        self.bytes[operator] = self.bytes.get(operator, 0) + size


_records: list[MessageRecord] = []  # only added to: a backward runs in threads that do not see a context variable


@contextmanager
def recorded() -> Iterator[MessageRecord]:
    """Open a context that counts what is really sent: an operator whose result is kept does not run again."""
    record = MessageRecord()
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def _record(operator: str, size: int) -> None:
    for record in _records:
        record.add(operator, size)


def gather_equal(gathered: Tensor, rows: Tensor, group: Any, *, wait: bool = True) -> Any:
    """Fill `gathered` with the `rows` of all ranks, equally many. Without `wait`, return what is to be waited for."""
    # Before torch 2.13 it has another name, which warns since then.
    collective: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return collective(gathered, rows, group=group, async_op=not wait)


def _group(name: str) -> Any:
    resolve: Any = _resolve_process_group
    return resolve(name)


def _sent_away(rows: Tensor, sent: Sequence[int], me: int) -> int:
    return (sum(sent) - sent[me]) * rows[:1].numel() * rows.element_size() if len(rows) else 0


@torch.library.custom_op("treering::all_to_all_rows", mutates_args=())
def all_to_all_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    """Return the rows that other ranks have for this one, in the order of the ranks. A collective.

    Args:
        rows: [sum(sent), …], those for each rank of the group in its order.
        sent, received: the number of rows for, and from, each rank.
        group: the name of the process group.
    """
    ranks = _group(group)
    _record("all_to_all_rows", _sent_away(rows, sent, dist.get_rank(ranks)))
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=ranks)
    return arrived


@torch.library.custom_op("treering::all_to_all_in_pairs", mutates_args=())
def all_to_all_in_pairs(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    """Return what `all_to_all_rows` returns, bit for bit. In each round a rank exchanges with one other at most."""
    ranks = _group(group)
    me = dist.get_rank(ranks)
    _record("all_to_all_in_pairs", _sent_away(rows, sent, me))
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    out, into = rows.contiguous().split(list(sent)), arrived.split(list(received))
    into[me].copy_(out[me])
    _exchange_in_pairs(out, into, ranks)
    return arrived


_met: set[str] = set()  # groups whose ranks have all met


def _meet(ranks: Any, device: torch.device) -> None:
    """Let all ranks of a group meet before the first pair does: NCCL makes a group's links in its first messages, and
    waits for every rank; in a round of pairs one may rest."""
    if ranks.group_name not in _met and device.type != "cpu":
        dist.all_reduce(torch.zeros(1, device=device), group=ranks)
    _met.add(ranks.group_name)


def _exchange_in_pairs(out: Sequence[Tensor], into: Sequence[Tensor], ranks: Any) -> None:
    """Send `out[j]` to rank j of the group and receive `into[j]` from it, for all others. Nothing is sent of no row."""
    me, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    _meet(ranks, out[me].device)
    for round_ in range(rounds(size)):
        other = partner(me, round_, size)
        if other is None:
            continue
        both = ((dist.isend, out[other]), (dist.irecv, into[other]))
        # One batch, so that both directions use the link at once.
        batch = [dist.P2POp(way, piece, group=ranks, group_peer=other) for way, piece in both if piece.numel()]
        for work in dist.batch_isend_irecv(batch) if batch else ():
            work.wait()


def _arrived(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    return rows.new_empty(sum(received), *rows.shape[1:])


all_to_all_rows.register_fake(_arrived)
all_to_all_in_pairs.register_fake(_arrived)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.sent, ctx.received, ctx.group = inputs


def _send_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return all_to_all_rows(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


all_to_all_rows.register_autograd(_send_back, setup_context=_remember)


@torch.library.custom_op("treering::all_gather_rows", mutates_args=())
def all_gather_rows(rows: Tensor, numbers: Sequence[int], group: str, transport: str) -> Tensor:
    """Return the rows of all ranks, [sum(numbers), …], in the order of the ranks. A collective.

    Args:
        rows: those of this rank.
        numbers: of rows of each rank.
        group: the name of the process group.
        transport: `collective` or `paired`.
    """
    ranks = _group(group)
    me = dist.get_rank(ranks)
    width = rows[:1].numel() * rows.element_size()
    if transport == "paired":
        _record("all_gather_rows", (len(numbers) - 1) * len(rows) * width)
        gathered = rows.new_empty(sum(numbers), *rows.shape[1:])
        into = gathered.split(list(numbers))
        into[me].copy_(rows)
        _exchange_in_pairs([rows.contiguous()] * len(numbers), into, ranks)
        return gathered
    most = max(numbers)  # collectives want equal numbers; those of ranks differ by a row or two
    _record("all_gather_rows", (len(numbers) - 1) * most * width)
    padded = rows.contiguous()
    if len(rows) < most:
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    gathered = rows.new_empty(most * len(numbers), *rows.shape[1:])
    gather_equal(gathered, padded, ranks)
    if min(numbers) == most:
        return gathered
    return torch.cat([piece[:number] for piece, number in zip(gathered.split(most), numbers)])


@all_gather_rows.register_fake
def _(rows: Tensor, numbers: Sequence[int], group: str, transport: str) -> Tensor:
    return rows.new_empty(sum(numbers), *rows.shape[1:])


def all_to_all(transport: Transport) -> Callable[[Tensor, Sequence[int], Sequence[int], str], Tensor]:
    """Return the operator that exchanges rows by `transport`."""
    return all_to_all_rows if transport == "collective" else all_to_all_in_pairs
