"""First values of techniques' own tensors: each part of a weight is split once, by one rank.

A chain whose parts have independent rows is split in pieces, one expert (or some rows of a matrix) at a time, by a rank
that holds these rows: none needs more memory than its share and one piece. Any other chain is one piece, and each piece
goes to the rank that has least to do. Where several ranks need a result it passes through the folder `prepared`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.collectives import gather_objects
from treering.core.errors import PlanError
from treering.core.sharded import local, local_rows, put, put_rows
from treering.plan.chain import Chain, Statistics, join, split
from treering.plan.prepared import Prepared, digest, key
from treering.technique import LazyTensor
from treering.weights.plain_tensors import PlainTensor

if TYPE_CHECKING:
    from treering.weights.plain_tensors import Source

AT_ONCE = 64 << 20  # bytes of a matrix's rows that are read at a time


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `start` to `stop` of a chain's weight, which has `rows` of them."""

    chain: Chain
    start: int
    stop: int
    rows: int

    @property
    def cost(self) -> float:
        return self.chain.cost * (self.stop - self.start) / max(self.rows, 1)

    @property
    def id(self) -> tuple[str, int]:
        return self.chain.name, self.start


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one piece: its name in `prepared`, ‖join(split(W)) − W‖/‖W‖, and ‖W‖."""

    key: str
    error: float
    norm: float


@dataclass(frozen=True)
class InMemory:
    """A LazyTensor whose values have been read."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def stored(self) -> None:
        return None

    def read(self) -> Tensor:
        return self.tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


def row_count(tensor: LazyTensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def rows_at_once(tensor: LazyTensor) -> int:
    """Return how many rows of `tensor` are read at a time: one expert of a stack, many rows of a matrix.

    A tensor that can only be read whole, because its conversion mixes rows, is read once.
    """
    if isinstance(tensor, PlainTensor) and tensor.row_reader is None:
        return max(row_count(tensor), 1)
    if len(tensor.shape) > 2:
        return 1
    row = torch.Size(tensor.shape[1:]).numel() * tensor.dtype.itemsize
    return max(1, AT_ONCE // max(row, 1))


@torch.no_grad()
def split_all(
    live: Mapping[str, Tensor],
    source: "Source",
    chains: Sequence[Chain],
    statistics: Statistics | None,
    prepared: Prepared | None,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Give own tensors of `chains` their values. Return ‖join(split(W)) − W‖/‖W‖ by plain name. A collective."""
    errors = prepare(live, source, chains, statistics, prepared, note)
    if prepared is not None:
        for chain in chains:
            for name in chain.names:
                start, stop = local_rows(live[name])
                put_rows(live[name], prepared.tensor(chain.name, name).rows(start, stop))
    return errors


@torch.no_grad()
def prepare(
    live: Mapping[str, Tensor],
    source: "Source",
    chains: Sequence[Chain],
    statistics: Statistics | None,
    prepared: Prepared | None,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Split `chains` and write the results to `prepared`, whose `results` then name them; without `prepared`, give them
    to the live tensors. Return ‖join(split(W)) − W‖/‖W‖ by plain name. A collective."""
    if not chains:
        return {}
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and prepared is None and not all(chain.independent_rows for chain in chains):
        raise PlanError("a folder for prepared tensors is needed, seen by all ranks: compose(…, prepared=DIR)")
    rows = {chain.name: row_count(source.tensors[chain.name]) for chain in chains}
    held = {chain.name: _held_rows(chain, live, rows[chain.name]) for chain in chains}
    everyone = gather_objects(held)
    if prepared is None:  # each rank makes what it holds
        pieces = [piece for chain in chains for piece in _pieces(chain, source, *held[chain.name])]
    else:
        pieces = _assigned(chains, source, everyone)[dist.get_rank() if several else 0]
    work = _Work(live=live, source=source, statistics=statistics, prepared=prepared)
    results, problem = {}, ""
    try:
        for chain in chains:
            weight: LazyTensor = source.tensors[chain.name]
            own = [piece for piece in pieces if piece.chain is chain]
            if len(own) > 1 and rows_at_once(weight) >= rows[chain.name]:
                weight = InMemory(weight.read())
            for piece in own:
                results[piece.id] = work.result(piece, weight)
    except Exception as error:
        if not several:
            raise
        problem = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes = gather_objects((problem, results, work.again))
    problems = [text for text, _, _ in outcomes if text]
    if problems:
        raise PlanError(f"splitting failed on {problems[0]}")
    results = {id_: result for _, part, _ in outcomes for id_, result in part.items()}
    again = [one for _, _, part in outcomes for one in part]
    if again:
        reason, where = again[0]
        more = f", and {len(again) - 1} more" if len(again) > 1 else ""
        note(f"{len(again)} of {len(results)} prepared results had to be made again: {where} was {reason}{more}")
    if prepared is not None:
        for chain in chains:
            pieces = _pieces(chain, source, 0, rows[chain.name])
            prepared.name(chain.name, [(piece.start, piece.stop, results[piece.id].key) for piece in pieces])
    return {chain.name: _error([r for (name, _), r in results.items() if name == chain.name]) for chain in chains}


@dataclass(kw_only=True)
class _Work:
    """What making the result of a piece takes. `again`: why a prepared one could not be used, and which."""

    live: Mapping[str, Tensor]
    source: "Source"
    statistics: Statistics | None
    prepared: Prepared | None

    def __post_init__(self) -> None:
        self.again: list[tuple[str, str]] = []

    def result(self, piece: Piece, weight: LazyTensor) -> Result:
        """Look the piece up in `prepared`, or split it; write it there, or give it to the live tensors. What was read
        for it is let go of when this returns."""
        chain, prepared = piece.chain, self.prepared
        plain = weight.rows(piece.start, piece.stop) if chain.independent_rows else weight.read()
        statistics = self._statistics(piece, plain)
        form = ("rows",) if chain.independent_rows else ()
        name = key(digest(plain), chain.identity, *form, _identity(chain, self.live, statistics))
        if prepared is not None:
            problem = prepared.problem(name, (*chain.names, "lost"))
            if problem == "":
                error, *norm = prepared.rows(name, "lost", 0, 2).tolist()  # a whole weight had no norm beside it once
                return Result(key=name, error=error, norm=norm[0] if norm else 1.0)
            if problem:
                self.again.append((problem, f"{prepared.path(name)} of {chain.name}"))
        tensors = split(chain, InMemory(plain), self.live, statistics)
        base = tensors.get(chain.name, plain if chain.name in self.live else torch.zeros_like(plain))
        wide = plain.to(torch.promote_types(plain.dtype, torch.float32))
        norm = wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
        error = float((join(chain.parts, tensors, base) - wide).norm() / norm)
        if prepared is not None:
            lost = torch.tensor([error, float(norm)], dtype=torch.float64)
            prepared.write(name, tensors | {"lost": lost})
        for own, value in tensors.items() if prepared is None else ():
            if chain.independent_rows:
                first = local_rows(self.live[own])[0]
                local(self.live[own])[piece.start - first : piece.stop - first].copy_(value)
            else:
                put(self.live[own], value)
        return Result(key=name, error=error, norm=float(norm))

    def _statistics(self, piece: Piece, plain: Tensor) -> Mapping[str, Tensor] | None:
        """Each expert of a stack has its own; the rows of a matrix share theirs."""
        looked_at = any(part.measured for part in piece.chain.parts)
        statistics = (self.statistics or {}).get(piece.chain.name) if looked_at else None
        if statistics is None or not piece.chain.independent_rows or plain.ndim < 3:
            return statistics
        return {
            name: value[piece.start : piece.stop] if value.ndim and value.shape[0] == piece.rows else value
            for name, value in statistics.items()
        }


def _held_rows(chain: Chain, live: Mapping[str, Tensor], rows: int) -> tuple[int, int]:
    """Return the rows of the weight that this rank makes if there is no folder: all, unless rows are independent."""
    if not chain.independent_rows:
        return 0, rows
    held = {name: (live[name].shape[:1], local_rows(live[name])) for name in chain.names}
    first = next(iter(held.values()), ((rows,), (0, rows)))
    strange = [name for name, one in held.items() if one != first or tuple(one[0]) != (rows,)]
    if strange:
        raise AssertionError(
            f"the parts of {chain.name} have independent rows, and {strange[0]} has not the {rows} rows of the weight, "
            "or other ones of them on this rank than the chain's other tensors"
        )
    return first[1]


def _pieces(chain: Chain, source: "Source", start: int, stop: int) -> list[Piece]:
    weight = source.tensors[chain.name]
    rows = row_count(weight)
    if not chain.independent_rows:
        return [Piece(chain=chain, start=0, stop=rows, rows=rows)]
    step = rows_at_once(InMemory(torch.empty(weight.shape, dtype=weight.dtype, device="meta")))
    return [
        Piece(chain=chain, start=first, stop=min(first + step, stop), rows=rows) for first in range(start, stop, step)
    ]


def _assigned(
    chains: Sequence[Chain], source: "Source", everyone: Sequence[Mapping[str, tuple[int, int]]]
) -> list[list[Piece]]:
    """Return each rank's pieces: longest first, each to the rank with the least so far that holds its first row."""
    assigned: list[list[Piece]] = [[] for _ in everyone]
    load = [0.0] * len(everyone)
    pieces = [piece for chain in chains for piece in _pieces(chain, source, 0, row_count(source.tensors[chain.name]))]
    for piece in sorted(pieces, key=lambda piece: (-piece.cost, piece.id)):
        name = piece.chain.name
        holders = [rank for rank, held in enumerate(everyone) if held[name][0] <= piece.start < held[name][1]]
        least = min(holders, key=lambda rank: (load[rank], rank))
        assigned[least].append(piece)
        load[least] += piece.cost
    return assigned


def _error(results: Sequence[Result]) -> float:
    """Return ‖join(split(W)) − W‖/‖W‖ of a weight from those of its pieces."""
    if len(results) == 1:
        return results[0].error
    norms = torch.tensor([result.norm for result in results], dtype=torch.float64)
    errors = norms * torch.tensor([result.error for result in results], dtype=torch.float64)
    return float(errors.norm() / norms.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _identity(chain: Chain, live: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None) -> str:
    dtypes = [f"{n}:{live[n].dtype}" for n in chain.names]
    return "\0".join([chain.name, *dtypes, *(f"{n}={digest(t)}" for n, t in sorted((statistics or {}).items()))])
