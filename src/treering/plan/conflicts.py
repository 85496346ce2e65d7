"""Checks that techniques can be combined, from their claims: without weights and without processes."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from treering.core.errors import PlanError
from treering.technique import Claim, Stage, Technique

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

MEANING = {
    "storage": "own how the weight is stored",
    "value": "multiply by other values than those of the weight",
    "addend": "add to the weight, and one of them must be alone in that",
    "gradient": "decide what happens to the gradient",
    "forward": "replace the forward",
    "region": "own the recomputed region",
    "attention": "replace the attention",
    "compiled": "compile",
    "sharding": "shard",
    "loss": "compute the loss",
}


def name_of(technique: Technique) -> str:
    """Return the key of a technique, as the user writes it in a configuration."""
    return type(technique).__name__.lower()


def check(claimed: Sequence[tuple[Technique, Sequence[Claim]]]) -> None:
    """Raise PlanError for the first pair of techniques whose claims conflict, naming what they conflict on."""
    for i, (first, claims) in enumerate(claimed):
        for second, others in claimed[i + 1 :]:
            _check_pair(first, claims, second, others)
    _check_needs(claimed)


def _check_pair(first: Technique, claims: Sequence[Claim], second: Technique, others: Sequence[Claim]) -> None:
    by_name = {(c.fqn, c.aspect): c for c in claims}
    clashes = []
    for other in others:
        mine = by_name.get((other.fqn, other.aspect))
        if mine is not None and (mine.exclusive or other.exclusive):
            clashes.append((mine, other))
    if not clashes:
        return
    mine, other = clashes[0]
    remedies = [claim.remedy for claim in (mine, other) if claim.remedy]
    remedy = remedies[0] if remedies else "use one of the two techniques"
    outs = [(c.setting or name_of(t), name_of(t)) for t, c in ((first, mine), (second, other)) if not c.remedy]
    leave = " or of ".join(setting for setting, _ in outs)
    leave += f", leave {outs[0][1]} out" if remedies and outs[0][0] != outs[0][1] else ""
    raise PlanError(
        f"{name_of(first)} and {name_of(second)} both {MEANING[mine.aspect]} of {_some(clashes)}. "
        f"Leave {'it' if len(clashes) == 1 else 'them'} out of {leave}, or {remedy}",
        settings=tuple(s for s in (mine.setting, other.setting) if s),
    )


def _check_needs(claimed: Sequence[tuple[Technique, Sequence[Claim]]]) -> None:
    stored = {c.fqn: (t, c) for t, claims in claimed for c in claims if c.aspect == "storage"}
    valued = {c.fqn: (t, c) for t, claims in claimed for c in claims if c.aspect == "value"}
    units = [(t, c) for t, claims in claimed for c in claims if c.aspect == "sharding"]
    for technique, claims in claimed:
        for claim in claims:
            if "plain_weight" in claim.needs and claim.fqn in stored:
                owner, storage = stored[claim.fqn]
                if owner is not technique:
                    out = f", or {storage.remedy}" if storage.remedy else f" or of {storage.setting}"
                    raise PlanError(
                        f"{name_of(technique)} needs the plain weight of {claim.fqn}, which {name_of(owner)} stores in "
                        f"its own form. Leave it out of {claim.setting}{out}",
                        settings=(claim.setting, storage.setting),
                    )
            if "own_value" in claim.needs and claim.fqn in valued:
                owner, value = valued[claim.fqn]
                raise PlanError(
                    f"{name_of(technique)} needs {claim.fqn} to multiply with its own values, and {name_of(owner)} "
                    f"multiplies with others. Leave it out of {claim.setting} or of {value.setting}",
                    settings=(claim.setting, value.setting),
                )
            if "no_fsdp_unit_inside" in claim.needs:
                for owner, unit in units:
                    if unit.fqn.startswith(f"{claim.fqn}."):
                        raise PlanError(
                            f"{name_of(technique)} runs {claim.fqn} several times, and {name_of(owner)} makes "
                            f"{unit.fqn} inside it a unit that would be gathered each time",
                            settings=(claim.setting, unit.setting),
                        )


def check_units(
    claimed: Sequence[tuple[Technique, Sequence[Claim]]], model: "nn.Module", attentions: Collection[str]
) -> None:
    """Refuse FSDP units inside a module that is run several times.

    Units for parameters with another dtype than the arithmetic are known only once every technique is applied.
    Attentions are omitted: only part of them is tiled, and their technique checks the first forward.
    """
    from torch.distributed.fsdp import FSDPModule

    for technique, claims in claimed:
        for claim in claims:
            if "no_fsdp_unit_inside" not in claim.needs or claim.fqn in attentions:
                continue
            for name, module in model.get_submodule(claim.fqn).named_modules():
                if name and isinstance(module, FSDPModule):
                    raise PlanError(
                        f"{name_of(technique)} runs {claim.fqn} several times, and {claim.fqn}.{name} inside it is an "
                        "FSDP unit of its own, because its dtype is not that of the arithmetic around it: it would be "
                        "gathered each time. Set model.dtype to that of shard.compute, so that the base is not cast; "
                        f"or give {claim.fqn}.{name} that dtype (lora.dtype: base), or set shard.compute to stored",
                        settings=("model.dtype", claim.setting, "shard.compute"),
                    )


def check_composition(
    techniques: Sequence[Technique],
    claimed: Sequence[Sequence[Claim]],
    mesh: "DeviceMesh | None",
    *,
    frozen: bool = False,
) -> None:
    """Refuse techniques of which none trains (unless the run is frozen), and an axis of the mesh that none serves."""
    from treering.core.topology import axis_size

    aspects = {claim.aspect for claims in claimed for claim in claims}
    training = [name_of(technique) for technique in techniques if technique.stage == Stage.ADAPT]
    if frozen and training:
        raise PlanError(f"the run is frozen, and {training[0]} trains: leave it out, or leave out frozen")
    if not frozen and not training:
        raise PlanError("nothing would be trained: add full, lora or osft to the techniques, or ask for frozen=True")
    losses = [name_of(t) for t, claims in zip(techniques, claimed) if any(c.aspect == "loss" for c in claims)]
    if len(losses) > 1:
        raise PlanError(f"{' and '.join(losses)} both compute the loss; use one of them")
    if axis_size(mesh, "replicate", "shard") > 1 and "sharding" not in aspects and not frozen:
        raise PlanError(
            f"the mesh has {axis_size(mesh, 'replicate', 'shard')} ranks with documents of their own, and no technique "
            "sums their gradients: add shard to the techniques (plain data parallelism is replicate=-1, shard=1)"
        )
    shared = axis_size(mesh, "sequence")
    if shared > 1 and "sharding" not in aspects and not frozen:
        raise PlanError(
            f"the mesh has sequence={shared}: each rank computes a part of each row, and no technique sums their "
            "gradients: add shard to the techniques",
            settings=("mesh.sequence",),
        )
    if shared > 1 and "attention" not in aspects:
        raise PlanError(
            f"the mesh has sequence={shared}, and no technique splits the sequence: add ulysses to the techniques",
            settings=("mesh.sequence",),
        )
    if axis_size(mesh, "expert") > 1 and "sharding" not in aspects:
        raise PlanError(
            f"the mesh has expert={axis_size(mesh, 'expert')}, and no technique assigns experts to ranks: add shard to "
            "the techniques",
            settings=("mesh.expert",),
        )


def _some(clashes: Sequence[tuple[Claim, Claim]]) -> str:
    rest = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
    return f"{clashes[0][0].fqn or 'the complete model'}{rest}"
