"""Whether an adapter can be exported alone: with the original model, its folder must give what was trained."""

from collections.abc import Iterator

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.plan.plan import Plan
from treering.plan.values import Values, like
from treering.technique import Adapter


def exportable(plan: Plan, name: str) -> Adapter:
    """Return the adapter called `name`; raise PlanError if a folder of it would give another model."""
    adapters = {a.adapter.name: a.adapter for a in plan.applied if a.adapter is not None}
    if name not in adapters:
        raise PlanError(f"there is no adapter called {name!r}; there is {', '.join(adapters) or 'none at all'}")
    chosen = adapters[name]
    moved = [n for n, chain in plan.chains.items() for p in chain.parts if p.moves_base and set(p.names) & chosen.own]
    if moved:
        raise PlanError(
            f"the adapter {name!r} moved the base weights at its start ({moved[0]} and {len(moved) - 1} more), so it "
            "does not fit the original model; export the dense model instead"
        )
    others = [name for a in plan.applied for name in a.trainable if name not in chosen.own and name in plan.plain]
    if others:
        raise PlanError(
            f"{others[0]} and {len(others) - 1} more plain parameters were trained besides the adapter {name!r}, and "
            "an adapter folder cannot hold them; export the dense model instead"
        )
    return chosen


def contents(plan: Plan, adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, on the meta device."""
    tensors_of_file = {key: like(plan, name) for name, key in adapter.keys.items()}
    for key, derived in adapter.derived.items():
        tensors_of_file[key] = torch.empty(derived.shape, dtype=like(plan, derived.names[0]).dtype, device="meta")
    return tensors_of_file


@torch.no_grad()
def tensors(adapter: Adapter, values: Values) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of an adapter's file, one at a time; a collective where the model is sharded."""
    for name, key in adapter.keys.items():
        yield {key: values.read(name).cpu()}
    for key, derived in adapter.derived.items():
        yield {key: derived.make({name: values.read(name) for name in derived.names}).contiguous().cpu()}
