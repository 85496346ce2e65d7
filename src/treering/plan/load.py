"""Plain tensors in: a rank's rows into plain parameters, and through chains of parts into techniques' own tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.core.sharded import local, local_rows, put, put_rows
from treering.plan.chain import Chain, Statistics, join, split
from treering.plan.prepared import Prepared
from treering.plan.splitting import rows_at_once, split_all
from treering.technique import LazyTensor
from treering.weights.plain_tensors import Source, plain_tensors

if TYPE_CHECKING:
    from torch import nn


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
    """Give every live parameter its first value. Return the error of each chain, ‖join(split(W)) − W‖/‖W‖.

    Args:
        model: Parameters have memory, on this rank's rows where they are sharded.
        source: The plain tensors.
        chains: By plain name, what techniques have made of it.
        statistics: What was measured of the weights, for parts that look at it.
        prepared: Results of splitting that all ranks see. Several ranks need it, unless rows are independent.
        note: Is given what a person should know, the same on every rank.
    """
    live = plain_tensors(model)
    errors = {}
    for group in source.groups:
        for name in group:
            chain = chains.get(name)
            if name in live and not (chain and chain.moves_base):
                copy_rows(live[name], source.tensors[name])
            if chain and not chain.reads:
                tensors = split(chain, source.tensors[name], live, (statistics or {}).get(name))
                errors[name] = _addition(chain, tensors, source.tensors[name])
                for own, value in tensors.items():
                    put(live[own], value)
    errors |= split_all(live, source, [c for c in chains.values() if c.reads], statistics, prepared, note)
    refuse_inexact(chains, errors)
    return errors


def refuse_inexact(chains: Mapping[str, Chain], errors: Mapping[str, float]) -> None:
    """Raise PlanError for a weight that its parts do not reproduce to their tolerance."""
    for name, error in errors.items():
        allowed = [part.tolerance for part in chains[name].parts]
        if None not in allowed and not error <= sum(a for a in allowed if a is not None):
            raise PlanError(
                f"{name} is not reproduced by what was made of it: ‖join(split(W)) − W‖/‖W‖ is {error:.2e}, "
                f"and at most {sum(a for a in allowed if a is not None):.2e} was promised"
            )


@torch.no_grad()
def refill(model: "nn.Module", source: Source, owned: Sequence[str], saved: Mapping[str, LazyTensor]) -> None:
    """Resume from a checkpoint: `owned` from what was saved, the rest from the source. Nothing is split again."""
    live = plain_tensors(model)
    from_checkpoint = set(owned)
    for group in source.groups:
        for name in group:
            if name in live and name not in from_checkpoint:
                copy_rows(live[name], source.tensors[name])
    for name in owned:
        copy_rows(live[name], saved[name])


def copy_rows(target: Tensor, tensor: LazyTensor) -> None:
    """Copy this rank's rows of `tensor` into `target`, a few at a time: beside the target lies one expert at most."""
    if not target.ndim:
        put_rows(target, tensor.read())
        return
    start, stop = local_rows(target)
    step = rows_at_once(tensor)
    if step >= stop - start:
        put_rows(target, tensor.rows(start, stop))
        return
    held = local(target)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        held[first - start : last - start].copy_(tensor.rows(first, last))


def _addition(chain: Chain, tensors: Mapping[str, Tensor], weight: LazyTensor) -> float:
    """Return what a start that never reads the weight adds to it; promised to be nothing unless it is an import."""
    if any(part.tolerance is None for part in chain.parts):
        return 0.0
    nothing = torch.zeros(()).expand(weight.shape)  # without memory: this must not be what loading peaks at
    return float(torch.linalg.vector_norm(join(chain.parts, tensors, nothing), float("inf")))
