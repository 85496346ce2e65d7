"""Whether an adapter can stand alone: beside the original model, a folder of it must give what was trained."""

from treering.errors import PlanError
from treering.plan.plan import Plan
from treering.technique import Adapter


def exportable(plan: Plan, name: str) -> Adapter:
    """The adapter called `name`, or why a folder of it would be another model."""
    adapters = {a.adapter.name: a.adapter for a in plan.applied if a.adapter is not None}
    if name not in adapters:
        raise PlanError(f"there is no adapter called {name!r}; there is {', '.join(adapters) or 'none at all'}")
    chosen = adapters[name]
    moved = [
        n for n, chain in plan.chains.items() for p in chain.parts if p.moves_base and set(p.names) & set(chosen.keys)
    ]
    if moved:
        raise PlanError(
            f"the adapter {name!r} moved the base weights at its start ({moved[0]} and {len(moved) - 1} more), so it "
            "does not fit the original model; export the dense model instead"
        )
    beside = [name for a in plan.applied for name in a.trainable if name not in chosen.keys and name in plan.plain]
    if beside:
        raise PlanError(
            f"{beside[0]} and {len(beside) - 1} more plain parameters were trained beside the adapter {name!r}, and an "
            "adapter folder cannot hold them; export the dense model instead"
        )
    return chosen
