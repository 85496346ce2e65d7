"""The lifecycle: open → resolve → claims → apply → shard → materialise → fill or resume → run."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from treering import attention
from treering.anatomy import Anatomy, examine
from treering.core.errors import PlanError
from treering.core.topology import mesh as make_mesh
from treering.curvature import Statistics as Measured
from treering.objectives import Objective
from treering.plan import conflicts
from treering.plan import open_model as opening
from treering.plan.load import Chain, Statistics, fill, refill
from treering.plan.loss import choose_objective
from treering.plan.materialise import materialise, remember, to_meta
from treering.plan.plan import Plan
from treering.plan.prepared import Prepared
from treering.plan.run import Run
from treering.technique import Applied, LazyTensor, Part, Site, Stage, Technique
from treering.weights.plain_tensors import plain_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


COMPOSED = "_treering_composed"  # a second composition would find adapters where it expects plain weights


def compose(
    model: "str | Path | PreTrainedModel",
    techniques: Iterable[Technique],
    *,
    mesh: "DeviceMesh | None" = None,
    dtype: str = "auto",
    seed: int = 0,
    dropout: opening.Dropout = "refuse",
    statistics: Statistics | None = None,
    prepared: str | Path | None = None,
    roles: Mapping[str, str] | None = None,
    frozen: bool = False,
    objective: Objective | None = None,
) -> Run:
    """`model` with `techniques` in place and weights loaded.

    model       a Hugging Face folder, a hub name, or a live model that is not sharded (its parameters are replaced)
    mesh        from treering.mesh(…); with Shard and no mesh, all ranks shard
    prepared    folder for results of splitting (an SVD), shared by all ranks; needed with several ranks
    roles       pattern -> role, where the anatomy cannot tell (see its message)
    frozen      nothing learns: for measuring, and for models that others learn from. Techniques that train are refused
    objective   what `run.loss` evaluates; None: cross-entropy
    """
    plan = draft(
        model,
        techniques,
        mesh=mesh,
        dtype=dtype,
        seed=seed,
        dropout=dropout,
        statistics=statistics,
        roles=roles,
        frozen=frozen,
        objective=objective,
    )
    return load(plan, statistics=statistics, prepared=prepared)


def draft(
    model: "str | Path | PreTrainedModel",
    techniques: Iterable[Technique],
    *,
    mesh: "DeviceMesh | None" = None,
    dtype: str = "auto",
    seed: int = 0,
    dropout: opening.Dropout = "refuse",
    statistics: Statistics | None = None,
    roles: Mapping[str, str] | None = None,
    weights: bool = True,
    name: str | None = None,
    folder: Path | None = None,
    frozen: bool = False,
    objective: Objective | None = None,
) -> Plan:
    """Everything up to, and without, the weights: every refusal comes from here. `weights=False` needs only a config.

    `folder` is where a live model's tokenizer lies, to be exported with it; `name` is what explain() calls the model.
    """
    ordered = _ordered(techniques)
    live = isinstance(model, nn.Module)
    folder = folder if live else opening.locate(str(model))
    built = model if live else opening.on_meta(folder, dtype)  # type: ignore[arg-type]
    assert isinstance(built, nn.Module)
    _refuse_used(built)
    if live and dtype != "auto" and built.dtype != opening.named_dtype(dtype):
        raise PlanError(f"dtype is {dtype} and the live model is {built.dtype}; cast it before, or leave dtype out")
    called = name or (type(built).__name__ if live else str(model))  # FSDP will rename the class
    anatomy = examine(built, roles)
    if isinstance(statistics, Measured):
        statistics.check(anatomy)
    opening.quiet_dropout(built, dropout)
    source = opening.source_of(built, None if live else folder) if weights else None  # type: ignore[arg-type]
    if mesh is None and (any(t.stage == Stage.SHARD for t in ordered) or _several_ranks()):
        mesh = make_mesh()  # of all ranks: without one, each would train a model of its own and nobody would tell
    ordered = tuple(t.resolve(anatomy, source, statistics) if hasattr(t, "resolve") else t for t in ordered)
    claimed = [t.claims(anatomy, mesh) for t in ordered]
    conflicts.check(list(zip(ordered, claimed)))
    conflicts.check_whole(ordered, claimed, mesh, frozen=frozen)
    plain = {name: (tuple(value.shape), value.dtype) for name, value in plain_tensors(built).items()}
    unpackable = attention.packable(built, anatomy)
    setattr(built, COMPOSED, True)
    restore = () if unpackable else (attention.install(built, anatomy),)
    give_back = remember(built)
    if live:
        to_meta(built)
    for parameter in built.parameters():
        parameter.requires_grad_(False)
    try:
        applied, chains = _apply(built, ordered, claimed, anatomy, mesh, seed, statistics)
        conflicts.check_units(list(zip(ordered, claimed)), built, {a.fqn for a in anatomy.attentions})
        objective = choose_objective(objective, applied)
    except PlanError:  # somebody's model is not to be lost by a refusal
        give_back()
        delattr(built, COMPOSED)
        for take_off in restore:
            take_off()
        raise
    return Plan(
        model=built,
        anatomy=anatomy,
        techniques=ordered,
        applied=applied,
        chains=chains,
        plain=plain,
        source=source,
        source_name=called,
        folder=folder,
        mesh=mesh,
        device=_device(mesh),
        seed=seed,
        objective=objective,
        unpackable=unpackable,
        restore=restore,
    )


def load(
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    prepared: str | Path | None = None,
    resume: Mapping[str, LazyTensor] | None = None,
) -> Run:
    """Memory and values for a plan: first ones, or those that `resume` holds of every name in `plan.owned`."""
    if plan.source is None:
        raise PlanError("this plan was drafted without weights")
    if plan.source.spent:
        raise PlanError("this plan's live model has given its weights away already; draft a plan of a fresh one")
    resting = torch.device("cpu") if any(a.resting == "cpu" for a in plan.applied) else plan.device
    materialise(plan.model, plan.device, resting)
    store = None if prepared is None else Prepared(Path(prepared))
    notes: list[str] = []
    if resume is None:
        lost = fill(plan.model, plan.source, plan.chains, statistics=statistics, prepared=store, note=notes.append)
    else:
        refill(plan.model, plan.source, plan.owned, resume)
        lost = {}
    plan.source.release()
    plan.model.train()
    return Run(plan, lost, notes=tuple(notes))


def _ordered(techniques: Iterable[Technique]) -> tuple[Technique, ...]:
    given = tuple(techniques)
    for one in given:
        if isinstance(one, type) or not isinstance(one, Technique):
            made = f"; write {one.__name__}()" if isinstance(one, type) else ""
            raise PlanError(f"{one!r} is not a technique{made}")
    return tuple(sorted(given, key=lambda t: t.stage))


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


def _apply(
    model: nn.Module,
    techniques: Sequence[Technique],
    claimed: Sequence[Sequence[Any]],
    anatomy: Anatomy,
    mesh: "DeviceMesh | None",
    seed: int,
    statistics: Statistics | None,
) -> tuple[tuple[Applied, ...], dict[str, Chain]]:
    done: list[Applied] = []
    parts: dict[str, tuple[Part, ...]] = {}
    identities: dict[str, str] = {}
    for technique, claims in zip(techniques, claimed):
        before = set(dict(model.named_parameters()))
        site = Site(anatomy=anatomy, mesh=mesh, seed=seed, parts=dict(parts), statistics=statistics)
        applied = technique.apply(model, site)
        _check_names(technique, applied, before, set(dict(model.named_parameters())), claims)
        live = dict(model.named_parameters())
        for name in live.keys() - before:
            live[name].requires_grad_(False)  # what is not declared does not learn, however it was made
        for name in applied.trainable:
            live[name].requires_grad_(True)
        for name, part in applied.parts.items():
            parts[name] = (*parts.get(name, ()), part)
            identities[name] = f"{identities.get(name, '')}|{part.identity or f'{seed} {technique!r}'}"
        done.append(applied)
    chains = {name: Chain(name=name, parts=links, identity=identities[name]) for name, links in parts.items()}
    return tuple(done), chains


def _check_names(
    technique: Technique, applied: Applied, before: set[str], after: set[str], claims: Sequence[Any]
) -> None:
    """A technique may add its own parameters and take away those it stores itself. Anything else is a bug in it."""
    own = {name for part in applied.parts.values() for name in part.names}
    stored = {claim.fqn for claim in claims if claim.aspect == "storage"}
    added, taken = after - before - own, before - after - stored
    if added or taken:
        raise AssertionError(
            f"{technique!r} changed names it did not claim: added {sorted(added)}, took {sorted(taken)}"
        )


def _device(mesh: "DeviceMesh | None") -> torch.device:
    if mesh is not None and mesh.device_type == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
