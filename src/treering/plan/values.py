"""Plain tensors as techniques reproduce them: joins of chains over full tensors, of a live model or of saved values."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.core.sharded import gather
from treering.plan.chain import Chain, join
from treering.plan.plan import Plan
from treering.technique import LazyTensor
from treering.weights.plain_tensors import export_groups, plain_tensors, to_file_layout


@dataclass(frozen=True, kw_only=True)
class Values:
    """Full tensors by live name. `read` is a collective where the model is sharded."""

    names: frozenset[str]
    read: Callable[[str], Tensor]


def live_values(plan: Plan) -> Values:
    """Return the values of the live model, gathered one at a time."""
    live = plan.live()
    return Values(names=frozenset(live), read=lambda name: gather(live[name]))


def saved_values(plan: Plan, saved: Mapping[str, LazyTensor]) -> Values:
    """Return the values of a run that is not in memory: owned ones from `saved`, the others from the source."""
    if plan.source is None:
        raise PlanError("this plan was drafted without weights")
    live, owned, source = plain_tensors(plan.model), set(plan.owned), plan.source.tensors

    def read(name: str) -> Tensor:
        tensor: LazyTensor = saved[name] if name in owned else source[name]
        return tensor.read().to(live[name].dtype)

    return Values(names=frozenset(live), read=read)


def plain(plan: Plan, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield each plain tensor as its chain reproduces it now, in its stored dtype."""
    values = live_values(plan)
    for name in names if names is not None else plan.plain:
        yield name, joined(plan, name, values)


@torch.no_grad()
def joined(plan: Plan, name: str, values: Values) -> Tensor:
    """Return one plain tensor as its chain reproduces it from `values`, in its stored dtype."""
    shape, dtype = plan.plain[name]
    base = values.read(name) if name in values.names else torch.zeros(shape, dtype=dtype)
    chain = plan.chains.get(name)
    if chain is None:
        return base.to(dtype)
    tensors = {own: values.read(own) for own in _joined_names(chain)}
    return join(chain.parts, tensors, base).to(dtype)


def take_part(plan: Plan, name: str, values: Values) -> None:
    """Take part in the collectives of `joined` on a rank that does not need the result."""
    chain = plan.chains.get(name)
    for own in (*({name} & values.names), *(_joined_names(chain) if chain else ())):
        values.read(own)


def _joined_names(chain: Chain) -> list[str]:
    """Return the names that the joins read. Bases that are not part of the weight are not gathered."""
    return [own for part in chain.parts for own in (part.names if part.joins is None else part.joins)]


def groups(plan: Plan, names: Iterable[str] | None = None) -> list[tuple[str, ...]]:
    """Return groups of plain names that become tensors of the file together, such as the experts of one block."""
    return export_groups(plan.model, plan.plain if names is None else names)


def announced(plan: Plan, group: Iterable[str]) -> dict[str, Tensor]:
    """Return what the file will hold of a group, on the meta device: names, shapes and dtypes."""
    shapes = {name: plan.plain[name] for name in group}
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    return to_file_layout(plan.model, empty)


def like(plan: Plan, own: str) -> Tensor:
    """Return the full shape and dtype of a live tensor, on the meta device."""
    live = plan.model.get_parameter(own)
    return torch.empty(tuple(live.shape), dtype=live.dtype, device="meta")
