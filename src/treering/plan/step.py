"""One optimizer step: project → finite guard → clip → step → retract. Once per step, never per micro-batch.

The norm that is clipped and reported is that of the projected gradient, over all parameters on all ranks.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from treering.core.collectives import gather_objects
from treering.core.errors import NumericsError, PlanError
from treering.core.sharded import local, settle, sharded_axes, sum_of_squares
from treering.technique import Applied


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of a step. `norm` is before clipping; a skipped step changes neither parameters nor optimizer."""

    norm: float
    skipped: bool


def take(
    optimizers: Sequence[Optimizer],
    named: Sequence[tuple[str, Tensor]],
    applied: Sequence[Applied],
    clip: float | None,
) -> StepReport:
    """Take one step with the present gradients, and return its norm and whether it was skipped."""
    for one in applied:
        if one.gradients is not None:
            one.gradients()
    gradients = [p.grad for _, p in named if p.grad is not None]
    # One number leaves the device each step: the guard must decide before the optimizer runs.
    norm = float(norm_over_meshes(gradients))
    finite = norm == norm and norm not in (float("inf"), float("-inf"))
    if finite:
        if clip is not None and norm > clip:
            shards = [g for g in map(local, gradients) if g.numel()]
            if shards:  # a rank may have no row of any trained parameter
                torch._foreach_mul_(shards, clip / norm)
        for one in applied:
            if one.before_step is not None:
                one.before_step(optimizers)
        for optimizer in optimizers:
            optimizer.step()
        for one in applied:
            if one.after_step is not None:
                one.after_step()
    return StepReport(norm=norm, skipped=not finite)


def make_optimizer(
    named: Sequence[tuple[str, nn.Parameter]], kind: type[Optimizer], settings: dict[str, Any]
) -> Optimizer:
    """Return `kind` over trained parameters; see `Run.optimizer`."""
    if not named:
        raise PlanError("the run is frozen, so there is nothing to optimize; compose it with full, lora or osft")
    chosen = settings.keys() & {"fused", "foreach", "differentiable", "capturable"}
    if kind is torch.optim.AdamW and not chosen and {p.device.type for _, p in named} == {"cpu"}:
        settings["fused"] = True
    if "weight_decay" in inspect.signature(kind).parameters:
        settings.setdefault("weight_decay", 0.0)
    if not settings.get("weight_decay"):
        return kind([p for _, p in named], **settings)
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if p.ndim >= 2]},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return kind([g for g in groups if g["params"]], **settings)


def check_optimizers(named: Sequence[tuple[str, Tensor]], optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that leave a trainable parameter out, which would never learn, or step one twice."""
    stepped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p): name for name, p in named}
    if len(stepped) == len(wanted) and set(stepped) == set(wanted):
        return
    absent = [name for key, name in wanted.items() if key not in set(stepped)]
    strange = len([key for key in stepped if key not in wanted])
    raise PlanError(
        "the optimizer's parameters are not exactly the trainable ones: "
        f"{len(absent)} missing ({', '.join(absent[:3]) or '—'}), {strange} not trainable, "
        f"{len(stepped) - len(set(stepped))} twice. Make it with run.optimizer(…) or from run.trainable()"
    )


def norm_over_meshes(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients. Those on different meshes are summed over their ranks and combined."""
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        mesh: DeviceMesh | None = None
        axes: tuple[int, ...] = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            axes = sharded_axes(gradient)
        groups.setdefault((mesh, axes), []).append(local(gradient))
    total: Tensor | None = None
    for (mesh, axes), shards in groups.items():
        square = sum_of_squares(shards)
        if mesh is not None:
            square = square.to(mesh.device_type)
            for axis in axes:
                dist.all_reduce(square, group=mesh.get_group(axis))
        total = square if total is None else total + square.to(total.device)
    return torch.zeros(()) if total is None else total.sqrt()


def non_finite_names(named: Iterable[tuple[str, Tensor]], limit: int = 8) -> list[str]:
    """Return the names of parameters whose gradient is not finite on this rank."""
    bad = [n for n, p in named if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all())]
    return bad[:limit] + ([f"and {len(bad) - limit} more"] if len(bad) > limit else [])


def _of_all_ranks(names: Sequence[str]) -> list[str]:
    """Return the names of all ranks, once each: the cause may be on any of them. A collective."""
    return list(dict.fromkeys(name for part in gather_objects(list(names)) for name in part))


def too_many_skips(skips: int, step: int, samples: Sequence[str], names: Sequence[str]) -> NumericsError:
    """Return the error for `skips` skipped steps in a row. A collective."""
    samples, names = _of_all_ranks(samples), _of_all_ranks(names)
    seen = ", ".join(samples[:8]) + (" …" if len(samples) > 8 else "")
    return NumericsError(
        f"{skips} steps in a row had a gradient that is not finite; stopped at step {step}. "
        f"Samples of the last one: {seen or 'not named by the loader'}. Parameters: {', '.join(names)}. "
        "Look at these samples, lower the learning rate, or compute in a wider dtype"
    )


def hooks(model: nn.Module, applied: Sequence[Applied], optimizer: Optimizer) -> tuple[RemovableHandle, ...]:
    """Project before and retract after each step of an optimizer that another loop calls.

    A step that a gradient scaler lets a fused optimizer skip calls the hooks as well, and changes nothing.
    """

    def before(_: Optimizer, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if any(one is not None for one in (*args[1:], keywords.get("closure"))):  # the first is the optimizer
            raise PlanError(
                "the optimizer was given a closure: it would compute gradients after they were to be projected. "
                "Call backward() yourself and step() without a closure"
            )
        settle(model)
        if _skips(optimizer):
            return
        for one in applied:
            if one.gradients is not None:
                one.gradients()
            if one.before_step is not None:
                one.before_step([optimizer])

    def after(*_: Any) -> None:
        for one in applied if not _skips(optimizer) else ():
            if one.after_step is not None:
                one.after_step()

    return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)


def _skips(optimizer: Optimizer) -> bool:
    """Return whether a gradient scaler has found gradients that are not finite; it sets this during a fused step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
