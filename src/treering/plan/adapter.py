"""Whether an adapter can stand alone: beside the original model, a folder of it must give what was trained."""

from collections.abc import Iterator

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.plan.plan import Plan
from treering.plan.values import Values, like
from treering.technique import Adapter


def exportable(plan: Plan, name: str) -> Adapter:
    """The adapter called `name`, or why a folder of it would be another model."""
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
    beside = [name for a in plan.applied for name in a.trainable if name not in chosen.own and name in plan.plain]
    if beside:
        raise PlanError(
            f"{beside[0]} and {len(beside) - 1} more plain parameters were trained beside the adapter {name!r}, and an "
            "adapter folder cannot hold them; export the dense model instead"
        )
    return chosen


def contents(plan: Plan, adapter: Adapter) -> dict[str, Tensor]:
    """What its file will hold, on the meta device."""
    own = {key: like(plan, name) for name, key in adapter.keys.items()}
    for key, derived in adapter.derived.items():
        own[key] = torch.empty(derived.shape, dtype=like(plan, derived.names[0]).dtype, device="meta")
    return own


@torch.no_grad()
def tensors(adapter: Adapter, values: Values) -> Iterator[dict[str, Tensor]]:
    """One at a time; a collective where the model is sharded."""
    for name, key in adapter.keys.items():
        yield {key: values.read(name).cpu()}
    for key, derived in adapter.derived.items():
        yield {key: derived.make({name: values.read(name) for name in derived.names}).contiguous().cpu()}
