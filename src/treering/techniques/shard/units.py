"""The choice of modules that become FSDP units, their policies, and what `hold` keeps complete."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from treering.core.errors import PlanError
from treering.core.topology import axis_size, expert_mesh, parameter_mesh, unit_mesh
from treering.technique import Site, recompute_state
from treering.techniques.shard.expert_units import assign_experts, dispatches, note, show_local
from treering.techniques.shard.traffic import ShardedUnit, ShardTraffic, is_of_experts, taken

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy
    from treering.techniques.shard.settings import ShardSettings

# Before 2.12 FSDP asked for gradients of every parameter, and torch has none for integers.
SHARDS_CODES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def plan_units(anatomy: "Anatomy", experts: bool = False) -> list[tuple[str, ...]]:
    """Return module names, a tuple per unit, in the order of wrapping; the root, "", last.

    Embeddings and head are units of their own: inside the root unit they would stay gathered through the complete
    backward. A tied pair is one unit, or each half would shard, and step, a parameter of its own. With `experts`,
    stacked experts are units of their own: they are sharded over other ranks than what is around them.
    """
    head = anatomy.head
    tied = head is not None and head.tied_to is not None
    units: list[tuple[str, ...]] = []
    for block in anatomy.blocks:
        units += [(one.fqn,) for one in anatomy.experts if experts and one.block == block.index]
        units.append((block.fqn,))
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
    mesh, view = parameter_mesh(site.mesh), expert_mesh(site.mesh)
    assigned = () if view is None else assign_experts(model, site.anatomy, view)
    units = plan_units(site.anatomy, experts=view is not None)
    wrapper = _Wrapper(model, config, site)
    sharded: list[tuple[int, ShardedUnit]] = []
    for unit in units:
        over = unit_mesh(view) if view is not None and unit[0] in assigned else mesh
        sharded += [(_order(unit, site.anatomy), one) for one in wrapper.wrap(unit, over, assigned)]
    for module in model.modules():
        if isinstance(
            module, FSDPModule
        ):  # the loss is divided by the global number of tokens already: sum, not average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # torch refuses too, without an alternative; copy and pickle look these up on the instance
            vars(module).update(__deepcopy__=_refuse_copy, __reduce_ex__=_refuse_copy)
    ranks = f"{mesh.size()} ranks" if mesh.ndim == 1 else f"{axis_size(site.mesh, 'replicate')} × {mesh.shape[1]} ranks"
    notes = [f"{len(units)} units over {ranks}, compute {config.compute}, reduce {config.reduce}"]
    if wrapper.apart:
        notes.append(f"{wrapper.apart} modules with a pinned dtype have units of their own")
    if config.offload == "cpu":
        notes.append("shards are stored in host memory")
    if config.hold != "nothing":
        notes.append(
            f"{'parameters and gradients' if config.hold == 'all' else 'gradients'} stay complete within a step"
        )
    if view is not None:
        notes.append(note(site.anatomy, view))
    in_order = [(order, unit) for order, unit in sorted(sharded, key=lambda one: one[0]) if unit.gathered]
    heads = [i for i, (order, _) in enumerate(in_order) if order in (2, 3)]  # the last one is the head's own
    compute = None if config.compute == "stored" else getattr(torch, config.compute)
    sent = () if view is None else dispatches(model, site.anatomy, view, compute)
    traffic = ShardTraffic(
        units=tuple(unit for _, unit in in_order), config=config, dispatches=sent, head=heads[-1] if heads else None
    )
    return tuple(notes), traffic


class _Wrapper:
    """Makes units of one model. `apart`: how many modules with a pinned dtype have units of their own so far."""

    def __init__(self, model: nn.Module, config: "ShardSettings", site: Site):
        assert site.mesh is not None
        self.model, self.config = model, config
        self.pinned = _pinned(model, site)
        self.apart = 0
        self.reshard = config.reshard and config.hold != "all"
        self.offload: OffloadPolicy = OffloadPolicy()
        if config.offload == "cpu":
            self.offload = CPUOffloadPolicy(pin_memory=site.mesh.device_type == "cuda")

    def wrap(self, unit: tuple[str, ...], mesh: "DeviceMesh", assigned: Collection[str]) -> list[ShardedUnit]:
        """Make a unit of the modules `unit`, over `mesh`, and units of what needs one of its own inside.

        Args:
            assigned: the experts modules whose experts are assigned to ranks.
        """
        config, root, of_experts = self.config, unit == ("",), unit[0] in assigned
        modules = [self.model.get_submodule(fqn) for fqn in unit]
        inside = {
            module: dtype
            for name, dtype in self.pinned.items()
            if any(name.startswith(f"{fqn}.") or fqn == "" for fqn in unit)
            and (of_experts or not any(name.startswith(f"{fqn}.") for fqn in assigned))
            and not isinstance(module := self.model.get_submodule(name), FSDPModule)
        }
        sharded = []
        compute = _cast(config, modules, inside)
        for module, dtype in inside.items():
            if _needs_own_unit(modules, module, dtype, compute):
                policy = MixedPrecisionPolicy(
                    param_dtype=dtype, reduce_dtype=_reduce(config, {dtype}), cast_forward_inputs=False
                )
                kinds = {"compute": dtype, "reduce": policy.reduce_dtype, "kept": not self.reshard}
                sharded.append(ShardedUnit.of([module], mesh, **kinds))  # type: ignore[arg-type]
                self._fully_shard(module, mesh, policy, self.reshard)
                self.apart += 1
                if of_experts:
                    show_local(module)
        _check_uniform(dict(zip(unit, modules)))
        # The weights of the chosen experts are computed next to the router, in a dtype of their own.
        policy = _policy(config, modules, compute, cast_inputs=not of_experts)
        kinds = {"compute": policy.param_dtype, "reduce": policy.reduce_dtype, "kept": root or not self.reshard}
        sharded.append(ShardedUnit.of(modules, mesh, **kinds))  # type: ignore[arg-type]
        # The root's own parameters (the last norm) are used at the very end of the forward and at the very start of
        # the backward: gathering them again would only wait.
        self._fully_shard(modules if len(modules) > 1 else modules[0], mesh, policy, self.reshard and not root)
        return sharded

    def _fully_shard(self, target: Any, mesh: "DeviceMesh", policy: MixedPrecisionPolicy, reshard: bool) -> None:
        fully_shard(target, mesh=mesh, mp_policy=policy, offload_policy=self.offload, reshard_after_forward=reshard)


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
    own = {p.dtype for p in _parameters(unit) if p not in apart and p.is_floating_point()}
    return None if own <= {compute} and pinned else compute


def _parameters(unit: list[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of a unit, without those of experts that are a unit inside it."""
    return [p for module in unit for p in module.parameters() if not (taken(p) and is_of_experts(p))]


def _policy(
    config: "ShardSettings", unit: list[nn.Module], compute: torch.dtype | None, *, cast_inputs: bool
) -> MixedPrecisionPolicy:
    gradients = {compute or p.dtype for p in _parameters(unit) if p.requires_grad}
    return MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=_reduce(config, gradients), cast_forward_inputs=cast_inputs
    )


def _reduce(config: "ShardSettings", gradients: set[torch.dtype]) -> torch.dtype | None:
    """Return the dtype of the sum, None for that of the gradients: float64 gradients are not rounded to float32."""
    reduce = None if config.reduce == "stored" else getattr(torch, config.reduce)
    return None if reduce is not None and all(dtype.itemsize >= reduce.itemsize for dtype in gradients) else reduce


def _check_uniform(unit: dict[str, nn.Module]) -> None:
    """Refuse a unit that trains two dtypes, by name: FSDP sums its gradients as one buffer and fails in the forward."""
    first: dict[torch.dtype, str] = {}
    for fqn, module in unit.items():
        for name, parameter in module.named_parameters(prefix=fqn):
            if parameter.requires_grad and not taken(parameter):
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
    others = {p.dtype for p in _parameters(unit) if p.requires_grad and p not in parameters}
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
