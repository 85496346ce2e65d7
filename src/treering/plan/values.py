"""Plain tensors as techniques reproduce them: joins of chains over complete tensors, of a model or of saved values."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.core.sharded import gather
from treering.plan.plan import Chain, Plan, copies, join
from treering.technique import LazyTensor
from treering.weights.conversion import export_groups, to_file_layout
from treering.weights.plain_tensors import plain_tensors


@dataclass(frozen=True, kw_only=True)
class Values:
    """Complete tensors by live name. `read` is a collective where the model is sharded."""

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
    live, owned = plain_tensors(plan.model), set(plan.owned)
    source = {**plan.source.tensors, **copies(plan.chains, plan.source)}

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
    tensors = {part_name: values.read(part_name) for part_name in joined_names(chain)}
    return join(chain.parts, tensors, base).to(dtype)


def take_part(plan: Plan, name: str, values: Values) -> None:
    """Take part in the collectives of `joined`, on a rank that does not need the result."""
    chain = plan.chains.get(name)
    for part_name in (*({name} & values.names), *(joined_names(chain) if chain else ())):
        values.read(part_name)


def joined_names(chain: Chain) -> list[str]:
    """Return the names that the joins read. Bases that are not part of the weight are not gathered."""
    return [name for part in chain.parts for name in (part.names if part.joins is None else part.joins)]


def groups(plan: Plan, names: Iterable[str] | None = None) -> list[tuple[str, ...]]:
    """Return groups of plain names that become tensors of the file together, such as the experts of one block."""
    return export_groups(plan.model, plan.plain if names is None else names)


def announced(plan: Plan, group: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors that a file will have of a group, on the meta device: names, shapes and dtypes."""
    shapes = {name: plan.plain[name] for name in group}
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    return to_file_layout(plan.model, empty)


def like(plan: Plan, name: str) -> Tensor:
    """Return a tensor on the meta device with the complete shape and the dtype of a live one."""
    live = plan.model.get_parameter(name)
    return torch.empty(tuple(live.shape), dtype=live.dtype, device="meta")
