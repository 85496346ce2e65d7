"""First values of the tensors that techniques store: each part of a weight is split once, by one rank.

A chain whose parts have independent rows is split in pieces, one expert (or some rows of a matrix) at a time, by a rank
that stores these rows: none needs more memory than its share and one piece. Any other chain is one piece. Each piece is
assigned to the rank with the least work. Where several ranks need a result, it is in the folder `prepared`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.collectives import gather_objects
from treering.core.errors import PlanError
from treering.core.owners import assign
from treering.core.progress import PartsDone
from treering.core.sharded import local, local_rows, put
from treering.plan.plan import Chain, Statistics, join, split
from treering.plan.prepared import ERROR, Prepared, digest, key
from treering.technique import LazyTensor, StoredTensor
from treering.weights.plain_tensors import PlainTensor

if TYPE_CHECKING:
    from treering.weights.plain_tensors import Source

AT_ONCE = 64 << 20  # bytes of a matrix's rows that are read at a time


@dataclass(frozen=True, kw_only=True)
class SplitPiece:
    """Rows `start` to `stop` of a chain's weight, which has `rows` of them."""

    chain: Chain
    start: int
    stop: int
    rows: int

    @property
    def cost(self) -> float:
        """The relative cost of splitting this piece."""
        return self.chain.cost * (self.stop - self.start) / max(self.rows, 1)

    @property
    def id(self) -> tuple[str, int]:
        """The weight's name and the first row."""
        return self.chain.name, self.start


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """The result of one piece: its name in `prepared`, ‖join(split(W)) − W‖/‖W‖, and ‖W‖."""

    key: str
    error: float
    norm: float


@dataclass(frozen=True)
class InMemory:
    """A LazyTensor whose values have been read; those of a stored weight, decoded.

    `start` is the place of its first row in the complete weight.
    """

    tensor: Tensor
    start: int = 0
    stored: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


def row_count(tensor: LazyTensor) -> int:
    """Return the number of rows of `tensor`; 1 for a scalar."""
    return tensor.shape[0] if tensor.shape else 1


def rows_at_once(tensor: LazyTensor) -> int:
    """Return how many rows of `tensor` are read at a time: one expert of a stack, many rows of a matrix.

    A tensor that can only be read completely, because its conversion mixes rows, is read once.
    """
    if isinstance(tensor, PlainTensor) and tensor.row_reader is None:
        return max(row_count(tensor), 1)
    if len(tensor.shape) > 2:
        return 1
    row = torch.Size(tensor.shape[1:]).numel() * tensor.dtype.itemsize
    return max(1, AT_ONCE // max(row, 1))


@torch.no_grad()
def prepare(
    live: Mapping[str, Tensor],
    source: "Source",
    chains: Sequence[Chain],
    statistics: Statistics | None,
    prepared: Prepared | None,
    note: Callable[[str], None],
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Split `chains` and write the results to `prepared`, whose `results` then name them, or else to the live tensors.

    `note` gets messages that are the same on every rank, `report` those on how much of it this rank has done.

    Return ‖join(split(W)) − W‖/‖W‖ by plain name. A collective.
    """
    if not chains:
        return {}
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and prepared is None and not all(chain.independent_rows for chain in chains):
        raise PlanError("a folder for prepared tensors is needed, seen by all ranks: compose(…, prepared=DIR)")
    rows = {chain.name: row_count(source.tensors[chain.name]) for chain in chains}
    local_ranges = {chain.name: _rows_of_rank(chain, live, rows[chain.name]) for chain in chains}
    rows_of_ranks = gather_objects(local_ranges)
    if prepared is None:  # each rank splits the rows that it stores
        pieces = [piece for chain in chains for piece in _pieces(chain, source, *local_ranges[chain.name])]
    else:
        pieces = _assigned(chains, source, rows_of_ranks)[dist.get_rank() if several else 0]
    if prepared is not None:
        prepared.bytes = sum(live[name].numel() * live[name].element_size() for chain in chains for name in chain.names)
    splitter = _Splitter(live=live, source=source, statistics=statistics, prepared=prepared)
    progress = PartsDone("preparing weights", [piece.cost for piece in pieces], report)
    results, problem = {}, ""
    try:
        for chain in chains:
            weight: LazyTensor = source.tensors[chain.name]
            pieces_of_chain = [piece for piece in pieces if piece.chain is chain]
            if len(pieces_of_chain) > 1 and rows_at_once(weight) >= rows[chain.name]:
                weight = InMemory(weight.read(), stored=weight.stored)
            for piece in pieces_of_chain:
                results[piece.id] = splitter.result(piece, weight)
                progress.done(piece.cost)
    except Exception as error:
        if not several:
            raise
        problem = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes = gather_objects((problem, results, splitter.repeated))
    problems = [text for text, _, _ in outcomes if text]
    if problems:
        raise PlanError(f"splitting failed on {problems[0]}")
    results = {id_: result for _, part, _ in outcomes for id_, result in part.items()}
    repeated = [one for _, _, part in outcomes for one in part]
    if repeated:
        reason, where = repeated[0]
        more = f", and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        note(f"{len(repeated)} of {len(results)} prepared results had to be computed again: {where} was {reason}{more}")
    if prepared is not None:
        for chain in chains:
            pieces = _pieces(chain, source, 0, rows[chain.name])
            prepared.name(chain.name, [(piece.start, piece.stop, results[piece.id].key) for piece in pieces])
    return {chain.name: _error([r for (name, _), r in results.items() if name == chain.name]) for chain in chains}


@dataclass(kw_only=True)
class _Splitter:
    """Computes results of pieces. `repeated`: why a prepared result could not be used, and which."""

    live: Mapping[str, Tensor]
    source: "Source"
    statistics: Statistics | None
    prepared: Prepared | None

    def __post_init__(self) -> None:
        self.repeated: list[tuple[str, str]] = []

    def result(self, piece: SplitPiece, weight: LazyTensor) -> SplitResult:
        """Return the result of a piece: read from `prepared`, or split and written there, or to the live tensors.

        What was read for it is freed on return.
        """
        chain, prepared = piece.chain, self.prepared
        plain = weight.rows(piece.start, piece.stop) if chain.independent_rows else weight.read()
        statistics = self._statistics(piece, plain)
        form = ["rows"] if chain.independent_rows else []
        if form and not all(part.reads_weight for part in chain.parts):
            form.append(str(piece.start))  # equal experts have seeds of their own
        name = key(digest(plain), chain.identity, *form, _identity(chain, self.live, statistics))
        if prepared is not None:
            problem = prepared.problem(name, (*chain.names, ERROR))
            if problem == "":
                # Earlier versions wrote no norm for a complete weight.
                error, *norm = prepared.rows(name, ERROR, 0, 2).tolist()
                return SplitResult(key=name, error=error, norm=norm[0] if norm else 1.0)
            if problem:
                self.repeated.append((problem, f"{prepared.path(name)} of {chain.name}"))
        stored = _stored_rows(weight.stored, piece) if chain.independent_rows else weight.stored
        tensors = split(chain, InMemory(plain, piece.start, stored), self.live, statistics)
        base = tensors.get(chain.name, plain if chain.name in self.live else torch.zeros_like(plain))
        wide = plain.to(torch.promote_types(plain.dtype, torch.float32))
        norm = wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
        error = float((join(chain.parts, tensors, base) - wide).norm() / norm)
        tensors = {name: value for name, value in tensors.items() if name in chain.names}
        if prepared is not None:
            errors = torch.tensor([error, float(norm)], dtype=torch.float64)
            prepared.write(name, tensors | {ERROR: errors})
        for part_name, value in tensors.items() if prepared is None else ():
            if chain.independent_rows:
                first = local_rows(self.live[part_name])[0]
                local(self.live[part_name])[piece.start - first : piece.stop - first].copy_(value)
            else:
                put(self.live[part_name], value)
        return SplitResult(key=name, error=error, norm=float(norm))

    def _statistics(self, piece: SplitPiece, plain: Tensor) -> Mapping[str, Tensor] | None:
        """Return the statistics of a piece: those of its experts of a stack, or those of the matrix of its rows."""
        measured = any(part.measured for part in piece.chain.parts)
        statistics = (self.statistics or {}).get(piece.chain.name) if measured else None
        if statistics is None or not piece.chain.independent_rows or plain.ndim < 3:
            return statistics
        return {
            name: value[piece.start : piece.stop] if value.ndim and value.shape[0] == piece.rows else value
            for name, value in statistics.items()
        }


def _stored_rows(stored: StoredTensor | None, piece: SplitPiece) -> StoredTensor | None:
    if stored is None:
        return None
    rows = {key: InMemory(tensor.rows(piece.start, piece.stop)) for key, tensor in stored.tensors.items()}
    return replace(stored, tensors=rows)


def _rows_of_rank(chain: Chain, live: Mapping[str, Tensor], rows: int) -> tuple[int, int]:
    """Return the rows of the weight that this rank splits if there is no folder: all, unless rows are independent."""
    if not chain.independent_rows:
        return 0, rows
    ranges = {name: (live[name].shape[:1], local_rows(live[name])) for name in chain.names}
    first = next(iter(ranges.values()), ((rows,), (0, rows)))
    wrong = [name for name, one in ranges.items() if one != first or tuple(one[0]) != (rows,)]
    if wrong:
        raise AssertionError(
            f"the parts of {chain.name} have independent rows, and {wrong[0]} does not have the {rows} rows of the "
            "weight, or has other rows on this rank than the chain's other tensors"
        )
    return first[1]


def _pieces(chain: Chain, source: "Source", start: int, stop: int) -> list[SplitPiece]:
    weight = source.tensors[chain.name]
    rows = row_count(weight)
    if not chain.independent_rows:
        return [SplitPiece(chain=chain, start=0, stop=rows, rows=rows)]
    step = rows_at_once(InMemory(torch.empty(weight.shape, dtype=weight.dtype, device="meta")))
    return [
        SplitPiece(chain=chain, start=first, stop=min(first + step, stop), rows=rows)
        for first in range(start, stop, step)
    ]


def _assigned(
    chains: Sequence[Chain], source: "Source", rows_of_ranks: Sequence[Mapping[str, tuple[int, int]]]
) -> list[list[SplitPiece]]:
    """Return each rank's pieces: longest first, each to the least loaded rank that stores its first row."""
    every = (piece for chain in chains for piece in _pieces(chain, source, 0, row_count(source.tensors[chain.name])))
    pieces = {piece.id: piece for piece in every}

    def stores(id_: tuple[str, int], rank: int) -> bool:
        start, stop = rows_of_ranks[rank][id_[0]]
        return start <= id_[1] < stop

    owners = assign({id_: piece.cost for id_, piece in pieces.items()}, len(rows_of_ranks), may_own=stores)
    assigned: list[list[SplitPiece]] = [[] for _ in rows_of_ranks]
    for id_, rank in owners.items():
        assigned[rank].append(pieces[id_])
    return assigned


def _error(results: Sequence[SplitResult]) -> float:
    """Return ‖join(split(W)) − W‖/‖W‖ of a weight from those of its pieces."""
    if len(results) == 1:
        return results[0].error
    norms = torch.tensor([result.norm for result in results], dtype=torch.float64)
    errors = norms * torch.tensor([result.error for result in results], dtype=torch.float64)
    return float(errors.norm() / norms.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _identity(chain: Chain, live: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None) -> str:
    dtypes = [f"{n}:{live[n].dtype}" for n in chain.names]
    return "\0".join([chain.name, *dtypes, *(f"{n}={digest(t)}" for n, t in sorted((statistics or {}).items()))])
