"""Memory and values for a drafted model: from the meta device to a rank's rows of every plain weight.

Plain parameters are copied; a weight that a technique stores in parts goes through its chain. Tied parameters stay one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.collectives import gather_objects
from treering.core.errors import CheckpointError, PlanError
from treering.core.sharded import local, local_rows, put, put_rows
from treering.plan.plan import Chain, Statistics, copies, join, split
from treering.plan.prepared import Prepared
from treering.plan.splitting import prepare, rows_at_once
from treering.technique import LazyTensor
from treering.weights.plain_tensors import Source, plain_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def to_meta(model: nn.Module) -> None:
    """Free every parameter's memory; buffers stay. A caller that needs the values builds a Source before."""
    _replace(model, lambda p: torch.empty_like(p, device="meta"))


def remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the present parameters."""
    places = [
        (module, name, parameter, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]

    def restore() -> None:
        for module, name, parameter, trained in places:
            parameter.requires_grad_(trained)
            module._parameters[name] = parameter

    return restore


def materialise(model: "PreTrainedModel", device: torch.device, resting: torch.device) -> None:
    """Allocate what is on meta: parameters on `resting`, still without values; buffers on `device`, with values."""
    _replace(model, lambda p: torch.empty_like(p, device=resting) if p.is_meta else p.to(resting))
    _buffers(model, device)


def _replace(model: nn.Module, make) -> None:
    """Replace parameters module by module. `Module.to_empty` would make two parameters of a tied one."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if old not in replaced:
                replaced[old] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
            module._parameters[name] = replaced[old]


def _buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Move buffers to `device`. Non-persistent ones (rotary frequencies) are in no file: the model computes them."""
    for module in model.modules():
        waiting: list[str] = []
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
                continue
            module._buffers[name] = torch.empty_like(buffer, device=device)
            if name in module._non_persistent_buffers_set:
                waiting.append(name)
        if waiting:
            _compute(model, module, waiting)


def _compute(model: "PreTrainedModel", module: nn.Module, waiting: list[str]) -> None:
    """Compute buffers by the model's initialisation, twice, from different values.

    PlanError for a buffer whose result depends on the earlier values: the initialisation does not compute it.
    """
    for parameter in module.parameters(recurse=False):
        # fill() loads the values: no random number must be drawn for them here
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    results: list[dict[str, Tensor]] = []
    for start in (0, 1):
        for name in waiting:
            _buffer(module, name).fill_(start)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model._init_weights(module)
        results.append({name: _buffer(module, name).clone() for name in waiting})
    for name in waiting:
        if not torch.equal(results[0][name], results[1][name]):
            raise PlanError(
                f"{type(model).__name__}: the buffer {name!r} of {type(module).__name__} is in no checkpoint and the "
                "model's initialisation does not compute it; load the model yourself and give compose() the live model"
            )


def _buffer(module: nn.Module, name: str) -> Tensor:
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer


@torch.no_grad()
def fill(
    model: "nn.Module",
    source: Source,
    chains: Mapping[str, Chain],
    *,
    statistics: Statistics | None = None,
    prepared: Prepared | None = None,
    note: Callable[[str], None] = lambda text: None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Set the first value of every live parameter. Return the error of each chain, ‖join(split(W)) − W‖/‖W‖.

    Args:
        model: Parameters have memory, on this rank's rows where they are sharded.
        source: The plain tensors.
        chains: By plain name, the parts in which techniques store it.
        statistics: The measurements of the weights, for parts that read them.
        prepared: Results of splitting that all ranks see. Several ranks need it, unless rows are independent.
        note: Is called with each message for the user, the same on every rank.
        report: Is called from time to time with how much this rank has prepared.
    """
    live = plain_tensors(model)
    errors = {}
    for group in source.groups:
        for name in group:
            chain = chains.get(name)
            if name in live and not (chain and chain.moves_base):
                copy_rows(live[name], source.tensors[name])
            if chain and not chain.reads:
                errors[name] = _start(chain, source.tensors[name], live, (statistics or {}).get(name))
    _copy_stored(live, source, chains)
    reading = [chain for chain in chains.values() if chain.reads]
    errors |= prepare(live, source, reading, statistics, prepared, note, report)
    if prepared is not None:
        for chain in reading:
            for name in chain.names:
                put_rows(live[name], prepared.tensor(chain.name, name).rows(*local_rows(live[name])))
    refuse_inexact(chains, errors)
    return errors


def refuse_inexact(chains: Mapping[str, Chain], errors: Mapping[str, float]) -> None:
    """Raise PlanError for a weight that its parts do not reproduce to their tolerance."""
    for name, error in errors.items():
        allowed = [part.tolerance for part in chains[name].parts]
        if None not in allowed and not error <= sum(a for a in allowed if a is not None):
            raise PlanError(
                f"{name} is not reproduced by its parts: ‖join(split(W)) − W‖/‖W‖ is {error:.2e}, "
                f"and at most {sum(a for a in allowed if a is not None):.2e} was promised"
            )


@torch.no_grad()
def refill(
    model: "nn.Module",
    source: Source,
    chains: Mapping[str, Chain],
    owned: Sequence[str],
    saved: Mapping[str, LazyTensor],
) -> None:
    """Resume from a checkpoint: `owned` from the saved values, the rest from the source. Nothing is split again."""
    live = plain_tensors(model)
    from_checkpoint = set(owned)
    for group in source.groups:
        for name in group:
            if name in live and name not in from_checkpoint:
                copy_rows(live[name], source.tensors[name])
    _copy_stored(live, source, chains)
    for name in owned:
        copy_rows(live[name], saved[name])


def _copy_stored(live: Mapping[str, Tensor], source: Source, chains: Mapping[str, Chain]) -> None:
    """Copy this rank's rows of what stays as the folder stores it. Damage that one rank sees is raised on all."""
    tensors = copies(chains, source)
    if not tensors:
        return
    problem = ""
    try:
        for name, tensor in tensors.items():
            copy_rows(live[name], tensor)
    except CheckpointError as error:
        problem = str(error)
    for text in filter(None, gather_objects(problem)):
        raise CheckpointError(text)


def copy_rows(target: Tensor, tensor: LazyTensor) -> None:
    """Copy this rank's rows of `tensor` into `target`, a few at a time: at most one expert is in memory next to it."""
    if not target.ndim:
        put_rows(target, tensor.read())
        return
    start, stop = local_rows(target)
    step = rows_at_once(tensor)
    if step >= stop - start:
        put_rows(target, tensor.rows(start, stop))
        return
    shard = local(target)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        shard[first - start : last - start].copy_(tensor.rows(first, last))


def _start(
    chain: Chain, weight: LazyTensor, live: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None
) -> float:
    """Set the first values of a chain that does not read the weight: of a stack, those of this rank's experts, one at a
    time. Return the largest value that they add to the weight: 0, unless values are imported."""
    if not chain.names:  # it is copied as it is stored
        return 0.0
    if not chain.independent_rows or len(weight.shape) < 3:
        tensors = split(chain, weight, live, statistics)
        for name, value in tensors.items():
            put(live[name], value)
        return _addition(chain, tensors, weight)
    first, last = local_rows(live[chain.names[0]])
    largest = 0.0
    for expert in range(first, last):
        one = _Shape(shape=(1, *weight.shape[1:]), dtype=weight.dtype, start=expert)
        tensors = split(chain, one, live, statistics)
        for name, value in tensors.items():
            local(live[name])[expert - first].copy_(value[0])
        largest = max(largest, _addition(chain, tensors, one))
    return largest


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Some rows of a weight that nobody reads: a LazyTensor with a shape and a place."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stored: None = None

    def read(self) -> Tensor:
        raise AssertionError("a part with reads_weight=False has read the weight")

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()


def _addition(chain: Chain, tensors: Mapping[str, Tensor], weight: LazyTensor) -> float:
    if any(part.tolerance is None for part in chain.parts):
        return 0.0
    nothing = torch.zeros(()).expand(weight.shape)  # without memory: this must not be the peak of loading
    return float(torch.linalg.vector_norm(join(chain.parts, tensors, nothing), float("inf")))
