"""The choice of modules that become FSDP units, their policies, and what `hold` keeps complete."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from treering.core.errors import PlanError
from treering.core.topology import axis_size, parameter_mesh
from treering.technique import Site, recompute_state
from treering.techniques.shard.traffic import ShardedUnit, ShardTraffic

if TYPE_CHECKING:
    from treering.anatomy import Anatomy
    from treering.techniques.shard.settings import ShardSettings

# Before 2.12 FSDP asked for gradients of every parameter, and torch has none for integers.
SHARDS_CODES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def plan_units(anatomy: "Anatomy") -> list[tuple[str, ...]]:
    """Return module names, a tuple per unit, in the order of wrapping; the root, "", last.

    Embeddings and head are units of their own: inside the root unit they would stay gathered through the complete
    backward. A tied pair is one unit, or each half would shard, and step, a parameter of its own.
    """
    units: list[tuple[str, ...]] = [(block.fqn,) for block in anatomy.blocks]
    head = anatomy.head
    tied = head is not None and head.tied_to is not None
    for fqn in anatomy.embeddings:
        if tied and head is not None and f"{fqn}.weight" == head.tied_to:
            units.append((fqn, head.fqn))
        else:
            units.append((fqn,))
    if head is not None and not tied:
        units.append((head.fqn,))
    return [*units, ("",)]


def shard(model: nn.Module, config: "ShardSettings", site: Site) -> tuple[tuple[str, ...], ShardTraffic]:
    """Wrap `model` in place. Return the lines for explain(), and what the units send."""
    assert site.mesh is not None
    if not SHARDS_CODES and not all(p.is_floating_point() for p in model.parameters()):
        raise PlanError(
            f"shard: torch {torch.__version__} cannot shard the codes of packed weights, and 2.12 and newer can; "
            "install one of these, or leave quantize or shard out",
            settings=("techniques.quantize", "techniques.shard"),
        )
    mesh = parameter_mesh(site.mesh)
    offload: OffloadPolicy = OffloadPolicy()
    if config.offload == "cpu":
        offload = CPUOffloadPolicy(pin_memory=site.mesh.device_type == "cuda")
    pinned = _pinned(model, site)
    reshard = config.reshard and config.hold != "all"
    apart = 0
    sharded: list[tuple[int, ShardedUnit]] = []
    for unit in plan_units(site.anatomy):
        order = _order(unit, site.anatomy)
        modules = [model.get_submodule(fqn) for fqn in unit]
        inside = {
            module: dtype
            for name, dtype in pinned.items()
            if any(name.startswith(f"{fqn}.") or fqn == "" for fqn in unit)
            and not isinstance(module := model.get_submodule(name), FSDPModule)
        }
        compute = _cast(config, modules, inside)
        for module, dtype in inside.items():
            if _needs_own_unit(modules, module, dtype, compute):
                policy = MixedPrecisionPolicy(
                    param_dtype=dtype, reduce_dtype=_reduce(config, {dtype}), cast_forward_inputs=False
                )
                kinds = {"compute": dtype, "reduce": policy.reduce_dtype, "kept": not reshard}
                sharded.append((order, ShardedUnit.of([module], mesh, **kinds)))  # type: ignore[arg-type]
                fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
                apart += 1
        _check_uniform(dict(zip(unit, modules)))
        target = modules if len(modules) > 1 else modules[0]
        root = unit == ("",)
        policy = _policy(config, modules, compute)
        kinds = {"compute": policy.param_dtype, "reduce": policy.reduce_dtype, "kept": root or not reshard}
        sharded.append((order, ShardedUnit.of(modules, mesh, **kinds)))  # type: ignore[arg-type]
        # The root's own parameters (the last norm) are used at the very end of the forward and at the very start of
        # the backward: gathering them again would only wait.
        fully_shard(
            target,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard and not root,
        )
    for module in model.modules():
        if isinstance(
            module, FSDPModule
        ):  # the loss is divided by the global number of tokens already: sum, not average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # torch refuses too, without an alternative; copy and pickle look these up on the instance
            vars(module).update(__deepcopy__=_refuse_copy, __reduce_ex__=_refuse_copy)
    over = f"{mesh.size()} ranks" if mesh.ndim == 1 else f"{axis_size(site.mesh, 'replicate')} × {mesh.shape[1]} ranks"
    notes = [f"{len(plan_units(site.anatomy))} units over {over}, compute {config.compute}, reduce {config.reduce}"]
    if apart:
        notes.append(f"{apart} modules with a pinned dtype have units of their own")
    if config.offload == "cpu":
        notes.append("shards are stored in host memory")
    if config.hold != "nothing":
        notes.append(
            f"{'parameters and gradients' if config.hold == 'all' else 'gradients'} stay complete within a step"
        )
    units = tuple(unit for _, unit in sorted(sharded, key=lambda one: one[0]) if unit.gathered)
    return tuple(notes), ShardTraffic(units=units, mesh=mesh, config=config)


def _order(unit: tuple[str, ...], anatomy: "Anatomy") -> int:
    """Return when the unit's forward ends: embeddings, blocks, head, embedding tied to the head, the model."""
    if unit == ("",):
        return 4
    if len(unit) > 1:
        return 3
    if unit[0] in anatomy.embeddings:
        return 0
    return 2 if anatomy.head is not None and unit[0] == anatomy.head.fqn else 1


def _refuse_copy(*_: Any) -> NoReturn:
    raise PlanError(
        "a sharded model cannot be copied or pickled: each rank has its own rows, and torch's units of sharding do not "
        "move to another module. Write the weights with run.export(folder) and open that, or compose a second model"
    )


def _cast(
    config: "ShardSettings", unit: list[nn.Module], pinned: Mapping[nn.Module, torch.dtype]
) -> torch.dtype | None:
    """Return the dtype to which a unit casts its parameters for arithmetic; None: it casts none.

    A unit whose own parameters are stored in that dtype casts nothing, and what is pinned to another dtype can be in
    it: a unit for each adapter would be a gather for each, and inside tiles one for each tile.
    """
    if config.compute == "stored":
        return None
    compute: torch.dtype = getattr(torch, config.compute)
    apart = {p for module in pinned for p in module.parameters()}
    own = {p.dtype for module in unit for p in module.parameters() if p not in apart and p.is_floating_point()}
    return None if own == {compute} and pinned else compute


def _policy(config: "ShardSettings", unit: list[nn.Module], compute: torch.dtype | None) -> MixedPrecisionPolicy:
    gradients = {compute or p.dtype for module in unit for p in module.parameters() if p.requires_grad}
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=_reduce(config, gradients))


def _reduce(config: "ShardSettings", gradients: set[torch.dtype]) -> torch.dtype | None:
    """Return the dtype of the sum, None for that of the gradients: float64 gradients are not rounded to float32."""
    reduce = None if config.reduce == "stored" else getattr(torch, config.reduce)
    return None if reduce is not None and all(dtype.itemsize >= reduce.itemsize for dtype in gradients) else reduce


def _check_uniform(unit: dict[str, nn.Module]) -> None:
    """Refuse a unit that trains two dtypes, by name: FSDP sums its gradients as one buffer and fails in the forward."""
    first: dict[torch.dtype, str] = {}
    for fqn, module in unit.items():
        for name, parameter in module.named_parameters(prefix=fqn):
            if parameter.requires_grad and not isinstance(parameter, DTensor):  # a DTensor is another unit's already
                first.setdefault(parameter.dtype, name)
    if len(first) > 1:
        parameters = " and ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for dtype, name in first.items())
        raise PlanError(
            f"shard: one unit would train {parameters}, and a unit's gradients have one dtype. Open the model with one "
            "dtype (model.dtype: float32), or freeze those of the other"
        )


def _pinned(model: nn.Module, site: Site) -> dict[str, torch.dtype]:
    """Return the modules that hold parameters with a pinned dtype."""
    modules = {}
    for chain in site.parts.values():
        for part in chain:
            if part.compute_dtype is not None:
                for name in part.names:
                    modules[name.rpartition(".")[0]] = part.compute_dtype
    return modules


def _needs_own_unit(unit: list[nn.Module], module: nn.Module, dtype: torch.dtype, compute: torch.dtype | None) -> bool:
    """Return whether `module` needs a unit of its own, which costs a gather: where the unit around it casts its
    parameters to another dtype, or trains another one."""
    if compute not in (None, dtype):
        return True
    # One unit's trainable parameters must share a dtype; frozen ones may differ.
    parameters = set(module.parameters())
    others = {p.dtype for m in unit for p in m.parameters() if p.requires_grad and p not in parameters}
    return any(p.requires_grad for p in parameters) and bool(others - {dtype})


class Hold:
    """Keep tensors complete between the micro-batches of a step, by FSDP's own settings, set before each forward.

    The last micro-batch of a step is known by counting: the plan gives all micro-batches of a step to the techniques
    before the first forward. A wrong count is an error before the optimizer steps. A loop that does not give its
    micro-batches to the plan has its gradients summed after each backward, as without `hold`. The plan calls `count`
    and `check`; `begin` is a hook of the model.
    """

    def __init__(self, model: nn.Module, parameters: bool):
        assert isinstance(model, FSDPModule)
        self.model, self.parameters = model, parameters
        self.waiting = 0  # micro-batches that were counted and have not begun
        model.register_forward_pre_hook(self.begin)

    def count(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.waiting += 1
        return batch

    def begin(self, *_: Any) -> None:
        if recompute_state() == "teacher":  # a pass more for the same micro-batch
            return
        self.waiting = max(0, self.waiting - 1)
        last = self.waiting == 0
        self.model.set_requires_gradient_sync(last)
        if self.parameters:
            self.model.set_reshard_after_backward(last)

    def check(self) -> None:
        """Refuse a step whose gradients are not summed over ranks yet: they would be added to those of the next."""
        if self.waiting:
            raise PlanError(
                f"shard.hold: {self.waiting} micro-batches were taken from run.steps() and did not run before the "
                "step, so gradients have not been summed over ranks. Take the micro-batches of one step, run them "
                "all, and step; or set shard.hold to nothing",
                settings=("shard.hold",),
            )
