"""A complete measurement of gradients: factors of every weight, then Λ, written as two publications of one folder.

A measurement that is killed between the two resumes with Λ: the folder says what it was measured on, and how.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from treering.core.errors import CheckpointError, PlanError
from treering.core.weights_digest import weights_digest
from treering.curvature import factors_layout
from treering.curvature.disk import NAME, open_folder, writing
from treering.curvature.entry import Counts
from treering.curvature.factors import CORRECTED, COUNTS, GradientFactors, GradientSettings, MatrixFactors
from treering.curvature.fingerprint import fingerprints
from treering.curvature.gradients import GradientPasses, MeasuredFactors
from treering.curvature.measured_model import MaskedBatches, MeasuredModel, evaluating
from treering.curvature.parts import parts_of
from treering.curvature.passes import passes_within
from treering.curvature.statistics import Ring, Statistics, in_memory
from treering.curvature.targets import Target, targets_of
from treering.curvature.vocabulary import Coverage
from treering.store.untrusted import read_json
from treering.technique import Maps

if TYPE_CHECKING:
    from treering.anatomy import Anatomy

Weights = dict[str, tuple[Tensor, dict[str, str]]]  # weight -> (c, piece -> key)


def measure_gradients(
    subject: MeasuredModel,
    batches: MaskedBatches,
    settings: GradientSettings,
    ring: Ring,
    to: Path | None,
    limit: int,
    progress: Callable[[int, int], None],
) -> Statistics:
    """Return the statistics of the inputs and gradients of all that is covered; see `measure`."""
    coverage = _coverage(subject, batches, settings)
    targets, left_out = _chosen(subject.model, subject.anatomy, subject.maps, coverage)
    if subject.shared > 1 and settings.kind != "kfac":
        raise PlanError(
            f"{settings.kind} needs the complete gradient of each document, and ranks of the mesh's `sequence` axis "
            "have a part of it each; measure kfac there, or without sequence in the mesh",
            settings=("mesh.sequence",),
        )
    model = weights_digest(subject.model)
    done = None if to is None else _begun(to, settings, model, ring)
    if done is not None and done.gradients is not None and done.gradients.complete:
        return done
    count = _Count(len(batches), progress)
    with evaluating(subject.model):
        passes = GradientPasses(subject, batches, targets, settings, count.one, coverage.counts)
        passes.prepare()
        every = passes_within(limit, {w: sum(map(prod, passes.shapes(w).values())) for w in targets})
        again = passes_within(limit, {w: prod(passes.corrected_shape(w)) for w in targets})
        count.passes = (0 if done else len(every)) + (len(again) if settings.kind == "ekfac" else 0)
        if to is None:
            return _in_memory(passes, every, again, ring, left_out, model)
        if done is None:
            _write_factors(passes, every, ring, left_out, model, to)
        if settings.kind == "ekfac":
            _write_corrected(passes, again, to)
    return open_folder(to)


def bytes_on_disk(model: nn.Module, anatomy: "Anatomy", settings: GradientSettings, maps: Maps | None = None) -> int:
    """Return the bytes of factors, eigenvectors and Λ, if no two weights have the same inputs: an upper bound."""
    total = 4 * sum(_embeddings(model, anatomy).values()) if settings.cover == "all" else 0
    coverage = Coverage(of=settings.cover, vocabulary=settings.vocabulary)
    for matrix in _chosen(model, anatomy, maps, coverage)[0].values():
        count = (1 if settings.experts == "pooled" else matrix.experts) or 1
        sides = 2 * (matrix.inputs**2 + matrix.outputs**2) + matrix.inputs + matrix.outputs
        apart = settings.kind in ("shampoo", "tkfac") or matrix.bias is not None
        moment = matrix.inputs**2 if apart else 0
        corrected = matrix.inputs * matrix.outputs if settings.kind == "ekfac" else 0
        total += 4 * count * (sides + moment + corrected)
    return total


class _Count:
    """Batches done, of all passes."""

    def __init__(self, batches: int, progress: Callable[[int, int], None]):
        self.batches, self.progress, self.done, self.passes = batches, progress, 0, 1

    def one(self) -> None:
        self.done += 1
        self.progress(min(self.done, self.batches * self.passes), self.batches * self.passes)


def _coverage(subject: MeasuredModel, batches: MaskedBatches, settings: GradientSettings) -> Coverage:
    """Return what is covered, with the counts of tokens. A collective."""
    embeddings = _embeddings(subject.model, subject.anatomy) if settings.cover == "all" else {}
    counts = {name: subject.token_counts(batches, tokens).float() for name, tokens in embeddings.items()}
    return Coverage(of=settings.cover, vocabulary=settings.vocabulary, counts=counts)


def _embeddings(model: nn.Module, anatomy: "Anatomy") -> dict[str, int]:
    """Return the embedding that can be covered, with its vocabulary."""
    return {part.name: part.inputs for part in parts_of(model, anatomy)[0].values() if part.kind == "embedding"}


def _chosen(
    model: nn.Module, anatomy: "Anatomy", maps: Maps | None, coverage: Coverage
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return what is measured, by name, and why each other matrix is not."""
    targets, left_out = targets_of(model, anatomy, maps, coverage)
    if not targets:
        raise PlanError("the model has no matrix in its blocks whose gradient can be measured")
    return targets, left_out


def _key(weight: str, piece: str) -> str:
    """Return the name under which a piece is stored; the inputs alone have the name of the weight, as in format 1."""
    return weight if piece in ("moment", "inputs") else f"{weight}|{piece}"


def _keys(passes: GradientPasses, weight: str) -> dict[str, str]:
    """Return the names of all pieces of a weight; those of inputs may be another weight's."""
    shared = passes.settings.kind in ("kfac", "ekfac")
    owner = passes.owners[weight] if shared else weight
    keys = {piece: _key(owner, piece) for piece in ("inputs", "inputs.vectors", "inputs.values")}
    if not shared:  # weighted inputs, next to the plain moment
        keys["inputs"] = f"{weight}|inputs"
    elif passes.targets[weight].bias is not None:  # inputs with a 1, next to them
        keys["inputs"] = f"{owner}|inputs"
    if weight in passes.counts:
        keys[COUNTS] = _key(weight, COUNTS)
    return keys | {piece: _key(weight, piece) for piece in ("gradients", "gradients.vectors", "gradients.values")}


def _moments(passes: GradientPasses) -> dict[str, str]:
    """Return the owner of the inputs of each plain weight whose inputs alone are measured: no adapters, and no experts
    that are pooled."""
    plain = {name for name, target in passes.targets.items() if target.moment}
    pooled = {name for name, target in passes.targets.items() if passes.pooled and target.lead}
    return {name: owner for name, owner in passes.owners.items() if name in plain - pooled}


def _stored(passes: GradientPasses, one: MeasuredFactors) -> Iterator[tuple[str, Tensor, Counts]]:
    """Yield (key, tensor, tokens) of what was measured of a weight."""
    counts: Counts = int(one.tokens) if one.tokens.ndim == 0 else tuple(int(n) for n in one.tokens)
    keys = _keys(passes, one.weight)
    for piece, tensor in one.pieces.items():
        plain = piece == "moment" or keys.get(piece) == one.weight
        yield (one.weight if piece == "moment" else keys[piece]), tensor, counts if plain else 0
    if COUNTS in keys:
        yield keys[COUNTS], passes.counts[one.weight], 0


def _shapes(passes: GradientPasses) -> dict[str, tuple[int, ...]]:
    """Return the shapes of everything that is stored, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in passes.targets:
        keys = _keys(passes, weight)
        for (_, term), shape in passes.shapes(weight).items():
            if term == "moment":
                shapes[weight] = shape
            elif term in ("inputs", "gradients"):
                shapes |= {keys[term]: shape, keys[f"{term}.vectors"]: shape, keys[f"{term}.values"]: shape[:-1]}
                if term == "inputs" and passes.moment_within(weight):
                    shapes[weight] = passes.targets[weight].moment or ()
        if COUNTS in keys:
            shapes[keys[COUNTS]] = tuple(passes.counts[weight].shape)
    return shapes


def _write_factors(
    passes: GradientPasses, every: list[list[str]], ring: Ring, left_out: Mapping[str, str], model: str, to: Path
) -> None:
    weights: Weights = {}
    rings: list[Ring] = []
    with writing(to, _shapes(passes), passes.subject.anatomy.model_type, _moments(passes), rings) as writer:
        for chosen in every:
            for one in passes.factors(chosen):
                weights[one.weight] = one.scale, _keys(passes, one.weight)
                for key, tensor, counts in _stored(passes, one):
                    writer.add(key, lambda tensor=tensor, counts=counts: (tensor, counts))  # type: ignore[misc]
        rings.append(replace(ring, tokens=passes.tokens))
        writer.fingerprints = fingerprints(passes.subject.model, _moments(passes))
        writer.gradients = factors_layout.described(
            passes.settings, passes.documents, passes.tokens, model, left_out, weights
        )


def _write_corrected(passes: GradientPasses, again: list[list[str]], to: Path) -> None:
    present = open_folder(to)
    assert present.gradients is not None
    passes.documents, passes.tokens = present.gradients.documents, present.gradients.tokens
    description = read_json(to / NAME)
    weights: Weights = {w: (one.scale, {**one.keys}) for w, one in present.gradients.items()}
    shapes = {_key(weight, CORRECTED): passes.corrected_shape(weight) for weight in passes.targets}
    owners = {weight: entry.key for weight, entry in present.entries.items()}
    kept = description["tensors"]
    with writing(to, shapes, present.model_type, owners, present.rings, kept=kept) as writer:
        for chosen in again:
            for weight, values in passes.corrected(chosen, lambda weight: _basis(present.gradients, weight)):
                writer.add(_key(weight, CORRECTED), lambda values=values: (values, 0))  # type: ignore[misc]
                weights[weight][1][CORRECTED] = _key(weight, CORRECTED)
        writer.fingerprints = present.fingerprints
        writer.gradients = {**description["gradients"], "weights": factors_layout.described_weights(weights)}


def _basis(factors: GradientFactors | Mapping[str, MatrixFactors] | None, weight: str) -> tuple[Tensor, Tensor]:
    assert factors is not None
    return factors[weight].basis("inputs")[0], factors[weight].basis("gradients")[0]


def _in_memory(
    passes: GradientPasses, every: list[list[str]], again: list[list[str]], ring: Ring, left_out: Mapping[str, str],
    model: str,
) -> Statistics:  # fmt: skip
    tensors: dict[str, Tensor] = {}
    counts: dict[str, Counts] = {}
    factors: dict[str, MatrixFactors] = {}
    for chosen in every:
        for one in passes.factors(chosen):
            for key, tensor, count in _stored(passes, one):
                tensors[key], counts[key] = tensor, count
            keys = _keys(passes, one.weight)
            factors[one.weight] = MatrixFactors(weight=one.weight, scale=one.scale, keys=keys, read=tensors.__getitem__)
    if passes.settings.kind == "ekfac":
        for chosen in again:
            for weight, values in passes.corrected(chosen, lambda weight: _basis(factors, weight)):
                tensors[_key(weight, CORRECTED)], counts[_key(weight, CORRECTED)] = values, 0
        factors = {w: replace(one, keys={**one.keys, CORRECTED: _key(w, CORRECTED)}) for w, one in factors.items()}
    rings = (replace(ring, tokens=passes.tokens),)
    every_owner = {**{key: key for key in tensors}, **_moments(passes)}
    known = in_memory(passes.subject.anatomy.model_type, tensors, every_owner, counts, rings)
    gradients = GradientFactors(
        settings=passes.settings,
        documents=passes.documents,
        tokens=passes.tokens,
        model=model,
        weights=factors,
        left_out=left_out,
        entries={entry.key: entry for entry in known.entries.values()},
    )
    return Statistics(
        model_type=known.model_type,
        entries={weight: known.entries[weight] for weight in _moments(passes)},
        rings=rings,
        read=lambda entry: tensors[entry.key],
        gradients=gradients,
        fingerprints=fingerprints(passes.subject.model, _moments(passes)),
    )


def _begun(to: Path, settings: GradientSettings, model: str, ring: Ring) -> Statistics | None:
    """Return what is in the folder, if it was measured on the same model and text in the same way."""
    with suppress(CheckpointError):
        present = open_folder(to)
        one = present.gradients
        same = one is not None and (one.settings, one.model) == (settings, model)
        if same and ring.data and [r.data for r in present.rings] == [ring.data]:
            return present
    return None
