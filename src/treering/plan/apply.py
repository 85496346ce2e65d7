"""Applies techniques to a model one after the other; later ones see the weights that quantizing ones reproduce."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.plan.conflicts import check, name_of
from treering.plan.plan import Chain, join, split, without
from treering.technique import Applied, Claim, LazyTensor, Part, Site, Stage, StoredTensor, Technique, TrainedMatrix
from treering.weights.plain_tensors import Source, plain_tensors


def apply_all(
    model: nn.Module,
    techniques: Sequence[Technique],
    claimed: Sequence[Sequence[Claim]],
    site: Site,
) -> tuple[tuple[Applied, ...], dict[str, Chain]]:
    """Apply `techniques`, which are in the order of their stages, to `model` in place, each at `site` with what those
    before it have added.

    Returns:
        The result of each technique, and the chain of parts of each plain tensor that has one.
    """
    applied: list[Applied] = []
    parts: dict[str, tuple[Part, ...]] = {}
    maps: dict[str, tuple[TrainedMatrix, ...]] = {}
    identities: dict[str, str] = {}
    for technique, claims in zip(techniques, claimed):
        before = set(dict(model.named_parameters()))
        current_site = replace(
            site, parts=dict(parts), maps=dict(maps), without=partial(without, tuple(zip(techniques, applied)))
        )
        one = technique.apply(model, current_site)
        live = dict(model.named_parameters())
        _check_names(technique, one, before, set(live), claims)
        for name in live.keys() - before:
            live[name].requires_grad_(False)  # what is not declared trainable is not trained
        for name in one.trainable:
            live[name].requires_grad_(True)
        for name, part in one.parts.items():
            parts[name] = (*parts.get(name, ()), part)
            identities[name] = f"{identities.get(name, '')}|{part.identity or f'{site.seed} {technique!r}'}"
        for name, matrices in one.maps.items():
            maps[name] = (*maps.get(name, ()), *matrices)
        applied.append(one)
    chains = {name: Chain(name=name, parts=links, identity=identities[name]) for name, links in parts.items()}
    return tuple(applied), chains


def _check_names(
    technique: Technique, applied: Applied, before: set[str], after: set[str], claims: Sequence[Claim]
) -> None:
    """Raise an error for parameters that a technique added or removed without declaring it.

    It may add the parameters of its parts and remove those whose storage it claims. Anything else is a bug in it.
    """
    part_names = {name for part in applied.parts.values() for name in part.names}
    stored = {claim.fqn for claim in claims if claim.aspect == "storage"}
    if technique.stage == Stage.OBSERVE and (wrong := sorted({*(after - before), *applied.trainable, *part_names})):
        raise PlanError(
            f"{name_of(technique)} is of the stage OBSERVE, which comes after sharding, and adds or trains {wrong[0]}: "
            "it would not be summed over ranks. Give it an earlier stage, or keep what it collects outside the model"
        )
    added, removed = after - before - part_names, before - after - stored
    if added or removed:
        raise AssertionError(
            f"{technique!r} changed names it did not claim: added {sorted(added)}, removed {sorted(removed)}"
        )


def keep_stored(techniques: Iterable[Technique], source: Source | None) -> tuple[Technique, ...]:
    """Return `techniques` with one among them that keeps the weights which `source` has as stored ones, if any."""
    tensors: Mapping[str, Any] = source.tensors if source is not None else {}
    stored: dict[str, StoredTensor] = {name: t.stored for name, t in tensors.items() if t.stored is not None}
    kept = tuple(one.with_stored(stored) if hasattr(one, "with_stored") else one for one in techniques)
    if not stored or any(getattr(one, "keeps_stored", False) for one in kept):
        return kept
    # The list of techniques is not imported by name: plan knows techniques through the contract alone.
    every = import_module("treering.techniques").TECHNIQUES.values()
    added = next(cls.for_stored() for cls in every if hasattr(cls, "for_stored"))
    return (*kept, added.with_stored(stored))


def resolve_all(
    model: nn.Module,
    techniques: Sequence[Technique],
    source: Source | None,
    site: Site,
) -> tuple[Technique, ...]:
    """Return `techniques` with explicit settings where they depend on data; `model` is not changed.

    Techniques after the stage QUANTIZE see the weights that those of that stage reproduce, so that an adapter can be
    chosen for the residual.
    """

    def resolved(one: Technique, seen: Source | None) -> Technique:
        return one.resolve(site.anatomy, seen, site.statistics) if hasattr(one, "resolve") else one

    first = [resolved(t, source) for t in techniques if t.stage == Stage.QUANTIZE]
    later = [t for t in techniques if t.stage != Stage.QUANTIZE]
    if source is not None and first:
        source = replace(source, tensors=ReproducedTensors(model, first, source, site))
    return (*first, *(resolved(t, source) for t in later))


class ReproducedTensors(Mapping[str, Any]):
    """The tensors of a source, as techniques of the stage QUANTIZE reproduce them.

    The techniques are applied to a copy of the model when a tensor is first asked for: most later techniques never do.
    """

    def __init__(self, model: nn.Module, techniques: Sequence[Technique], source: Source, site: Site):
        self.model, self.techniques, self.tensors, self.site = model, techniques, source.tensors, site

    @cached_property
    def reproduced(self) -> "Mapping[str, ReproducedTensor]":
        structure, site = _structure(self.model), self.site
        claimed = [t.claims(site.anatomy, site.mesh) for t in self.techniques]
        check(list(zip(self.techniques, claimed)))
        _, chains = apply_all(structure, self.techniques, claimed, site)
        live = plain_tensors(structure)
        return {
            name: ReproducedTensor(
                original=self.tensors[name], chain=chain, live=live, statistics=(site.statistics or {}).get(name)
            )
            for name, chain in chains.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self.reproduced.get(name) or self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _structure(model: nn.Module) -> nn.Module:
    """Return a copy of `model` on the meta device."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo: dict[int, Any] = {}
    for key, value in tensors.items():
        empty = torch.empty_like(value.detach(), device="meta")
        memo[key] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


@dataclass(frozen=True, kw_only=True)
class ReproducedTensor:
    """A plain weight as `chain` reproduces it, join(split(W)), computed when asked for.

    Attributes:
        original: W itself.
        live: The tensors of the chain in the model, for their dtypes.
    """

    original: LazyTensor
    chain: Chain
    live: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.original.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.original.dtype, torch.float32)

    @property
    def stored(self) -> StoredTensor | None:
        return self.original.stored

    @property
    def start(self) -> int:
        return self.original.start

    @torch.no_grad()
    def read(self) -> Tensor:
        weight = self.original.read()
        if self.original.stored is not None and any(part.copies for part in self.chain.parts):
            return weight.to(self.dtype)  # what is kept as it is stored is decoded without an error
        tensors = split(self.chain, self.original, self.live, self.statistics)
        plain = weight if self.chain.name in self.live else torch.zeros_like(weight)
        return join(self.chain.parts, tensors, tensors.get(self.chain.name, plain))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]
