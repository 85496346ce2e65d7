"""Composes a model and techniques: open → resolve → claims → apply → shard → materialise → fill or resume."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import nn

from treering import attention
from treering.anatomy import Anatomy, examine
from treering.core.errors import PlanError
from treering.core.module_forward import undo_all
from treering.core.topology import axis_size, without_expert_axis
from treering.core.topology import mesh as make_mesh
from treering.curvature import Statistics as Measured
from treering.curvature.fingerprint import notes_on_weights
from treering.objectives import Objective
from treering.plan import conflicts, open_model, teacher
from treering.plan.apply import apply_all, keep_stored, resolve_all
from treering.plan.batches import choose_objective
from treering.plan.load import fill, materialise, refill, remember, to_meta
from treering.plan.plan import Plan, Statistics
from treering.plan.prepared import Prepared
from treering.plan.refill import refuse_incomplete
from treering.plan.run import Run
from treering.technique import LazyTensor, Site, Stage, Technique
from treering.weights.plain_tensors import plain_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from treering.weights.quantized.folder import QuantizedFolder


COMPOSED = "_treering_composed"  # marks a model: composed again, it would have adapters instead of plain weights


class DraftSettings(TypedDict, total=False):
    """Arguments that `compose` passes on to `draft`, with the same defaults and meaning."""

    mesh: "DeviceMesh | None"
    dtype: str
    seed: int
    dropout: open_model.Dropout
    statistics: Statistics | None
    roles: Mapping[str, str] | None
    frozen: bool
    objective: Objective | None
    dequantize: bool


def compose(
    model: "str | Path | PreTrainedModel",
    techniques: Iterable[Technique],
    *,
    prepared: str | Path | None = None,
    **drafting: Unpack[DraftSettings],
) -> Run:
    """Return `model` with `techniques` in place and weights loaded.

    Args:
        model: A Hugging Face folder, a hub name, or a live model that is not sharded. The parameters of a live model
            are replaced.
        techniques: In any order.
        prepared: A folder for results of splitting (an SVD), shared by all ranks; needed with several ranks.
        **drafting: `mesh`, `dtype`, `seed`, `dropout`, `statistics`, `roles`, `frozen`, `objective`, `dequantize`: see
            `draft`.

    Example:
        run = tr.compose("Qwen/Qwen3-0.6B", [tr.LoRA(rank=16), tr.Shard()], mesh=tr.mesh(), dtype="float32")
    """
    plan = draft(model, techniques, **drafting)
    return load(plan, statistics=drafting.get("statistics"), prepared=prepared)


def draft(
    model: "str | Path | PreTrainedModel",
    techniques: Iterable[Technique],
    *,
    mesh: "DeviceMesh | None" = None,
    dtype: str = "auto",
    seed: int = 0,
    dropout: open_model.Dropout = "refuse",
    statistics: Statistics | None = None,
    roles: Mapping[str, str] | None = None,
    frozen: bool = False,
    objective: Objective | None = None,
    dequantize: bool = False,
    weights: bool = True,
    name: str | None = None,
    folder: Path | None = None,
) -> Plan:
    """Return the model with `techniques` in place and without values. Every refusal is raised here.

    Args:
        model: As for `compose`.
        techniques: In any order.
        mesh: From `treering.mesh(…)`; with Shard and no mesh, all ranks shard.
        dtype: In which weights are stored; `auto`: that of the folder's config, or of the live model.
        seed: For all random numbers.
        dropout: What to do with a model that has dropout: refuse it, set it to 0 (`off`), or keep it (`per_rank`).
        statistics: Of `treering.measure`, by plain name.
        roles: Pattern → role, where the anatomy cannot decide (see its message).
        frozen: Nothing is trained: for measuring, and for teachers. Techniques that train are refused.
        objective: What `run.loss` evaluates; None: cross-entropy. A teacher that it names is composed, too.
        dequantize: Decode the weights that a folder holds quantized, to `dtype`; else they stay as they are stored.
        weights: If False, only a config is needed, and the plan cannot be loaded.
        name: The model's name in `explain()`.
        folder: With a live model's tokenizer, to be exported with it.
    """
    live = isinstance(model, nn.Module)
    built, folder, quantized = _opened(model, folder, dtype, dequantize)
    source_name = name or (type(built).__name__ if live else str(model))  # FSDP will rename the class
    anatomy = _examined(built, roles, statistics)
    open_model.quiet_dropout(built, dropout)
    read = weights or quantized is not None  # in which formats a folder holds weights is in the headers of its files
    source = open_model.source_of(built, None if live else folder, quantized, keep=not dequantize) if read else None
    ordered = _ordered(keep_stored(_ordered(techniques), source))
    source = source if weights else None
    if mesh is None and (any(t.stage == Stage.SHARD for t in ordered) or _several_ranks()):
        mesh = make_mesh()  # of all ranks: without one, each would train a separate model without any error
    site = Site(anatomy=anatomy, mesh=mesh, seed=seed, statistics=statistics, open_folder=open_model.unquantized)
    ordered = resolve_all(built, ordered, source, site)
    claimed = [t.claims(anatomy, mesh) for t in ordered]
    conflicts.check(list(zip(ordered, claimed)))
    conflicts.check_composition(ordered, claimed, mesh, frozen=frozen)
    plain = {name: (tuple(value.shape), value.dtype) for name, value in plain_tensors(built).items()}
    teacher_plan, taught = _teacher(objective, ordered, anatomy, folder, mesh, weights)
    unpackable = attention.packable(built, anatomy) or (teacher_plan.unpackable if teacher_plan else None)
    restore = teacher.install_base(objective, built, anatomy)
    setattr(built, COMPOSED, True)
    restore += [] if unpackable else [attention.install(built, anatomy)]
    restore_parameters = remember(built)
    if live:
        to_meta(built)
    built.requires_grad_(False)
    try:
        applied, chains = apply_all(built, ordered, claimed, site)
        conflicts.check_units(list(zip(ordered, claimed)), built, {a.fqn for a in anatomy.attentions})
        teacher.refuse_base(objective, ordered, applied)
        objective = choose_objective(objective, applied)
    except PlanError:  # a live model keeps its values when it is refused
        restore_parameters()
        delattr(built, COMPOSED)
        undo_all(restore)()
        raise
    return Plan(
        model=built,
        anatomy=anatomy,
        techniques=ordered,
        applied=applied,
        chains=chains,
        plain=plain,
        source=source,
        source_name=source_name,
        folder=folder,
        mesh=mesh,
        device=_device(mesh),
        seed=seed,
        objective=objective,
        unpackable=unpackable,
        restore=tuple(restore),
        notes=(*_stored_notes(quantized, built, dequantize), *taught, *notes_on_weights(statistics, source)),
        teacher=teacher_plan,
    )


def load(
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    prepared: str | Path | Prepared | None = None,
    resume: Mapping[str, LazyTensor] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Run:
    """Return the run of a plan: with first values, or with those that `resume` has of every name in `plan.owned`.

    A checkpoint may omit some of them that `prepared` has: `treering.plan.refill.completed` adds these.
    """
    if plan.source is None:
        raise PlanError("this plan was drafted without weights")
    if plan.source.spent:
        raise PlanError("this plan's live model has given its weights away already; draft a plan of a fresh one")
    resting = torch.device("cpu") if any(a.resting == "cpu" for a in plan.applied) else plan.device
    materialise(plan.model, plan.device, resting)
    store = Prepared(Path(prepared)) if isinstance(prepared, str | Path) else prepared
    notes: list[str] = []
    if resume is None:
        known: dict[str, Any] = {"statistics": statistics, "prepared": store, "note": notes.append, "report": report}
        errors = fill(plan.model, plan.source, plan.chains, **known)
    else:
        refuse_incomplete(plan, resume)
        refill(plan.model, plan.source, plan.chains, plan.owned, resume)
        errors = {}
    plan.source.release()
    plan.model.train()
    if plan.teacher is not None:
        notes += load(plan.teacher).notes
        plan.teacher.model.eval()
    return Run(plan, errors, notes=tuple(notes), prepared=store)


def _teacher(
    objective: Objective | None,
    techniques: tuple[Technique, ...],
    student: Anatomy,
    folder: Path | None,
    mesh: "DeviceMesh | None",
    weights: bool,
) -> tuple[Plan | None, list[str]]:
    """Return the plan of a teacher that is a model of its own, None if there is none, and notes about it."""
    path = teacher.teacher_of(objective)
    if path is None or path == teacher.BASE:
        return None, []
    ranks = axis_size(mesh, "expert")
    if mesh is not None and ranks > 1 and not _divides(path, ranks):
        mesh = without_expert_axis(mesh)  # a teacher may be dense, or have another number of experts
    chosen = teacher.techniques_for(techniques, student, mesh)
    plan = draft(path, chosen, mesh=mesh, dropout="off", frozen=True, weights=weights, name=path)
    note = teacher.check_vocabulary(student, folder, plan)
    restore = (teacher.install_hidden(plan.model, plan.anatomy), *plan.restore)
    notes = [f"teacher {path}: {one}" for one in plan.notes] + ([note] if note else [])
    return replace(plan, restore=restore), notes


def _divides(path: str, ranks: int) -> bool:
    """Return whether the experts of a model can be assigned to so many ranks."""
    anatomy = examine(open_model.on_meta(open_model.locate(path), "auto"))
    return bool(anatomy.experts) and all(experts.number % ranks == 0 for experts in anatomy.experts)


def _opened(
    model: "str | Path | PreTrainedModel", folder: Path | None, dtype: str, dequantize: bool
) -> "tuple[PreTrainedModel, Path | None, QuantizedFolder | None]":
    """Return a model, on meta unless it is a live one, its folder, and the quantized weights of that."""
    if not isinstance(model, nn.Module):
        folder = open_model.locate(str(model))
        built = open_model.on_meta(folder, dtype)
        return built, folder, open_model.quantized_weights(folder, decode=dequantize)
    _refuse_used(model)
    open_model.refuse_router_loss(model.config)
    if dequantize:
        raise PlanError("dequantize is for folders with quantized weights, and the model is a live one; leave it out")
    if dtype != "auto" and model.dtype != open_model.named_dtype(dtype):
        raise PlanError(f"dtype is {dtype} and the live model is {model.dtype}; cast it before, or leave dtype out")
    return model, folder, None


def _stored_notes(quantized: "QuantizedFolder | None", built: "PreTrainedModel", dequantize: bool) -> tuple[str, ...]:
    return () if quantized is None else tuple(quantized.notes(built.dtype if dequantize else None))


def _examined(model: nn.Module, roles: Mapping[str, str] | None, statistics: Statistics | None) -> Anatomy:
    """Return the anatomy of `model`, which `statistics` must be of."""
    anatomy = examine(model, roles)  # type: ignore[arg-type]
    if isinstance(statistics, Measured):
        statistics.check(anatomy)
    return anatomy


def _ordered(techniques: Iterable[Technique]) -> tuple[Technique, ...]:
    every = tuple(techniques)
    for one in every:
        if isinstance(one, type) or not isinstance(one, Technique):
            remedy = f"; write {one.__name__}()" if isinstance(one, type) else ""
            raise PlanError(f"{one!r} is not a technique{remedy}")
    return tuple(sorted(every, key=lambda t: t.stage))


def _several_ranks() -> bool:
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _refuse_used(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    ):
        raise PlanError(
            "the model is sharded already; give compose() the plain model and add Shard() to the techniques"
        )
    if getattr(model, COMPOSED, False):
        raise PlanError("the model has been composed already; give compose() all techniques at once, and a fresh model")


def _device(mesh: "DeviceMesh | None") -> torch.device:
    if mesh is not None and mesh.device_type == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
