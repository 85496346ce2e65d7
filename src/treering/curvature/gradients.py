"""The backwards of a measurement of gradients: exact sums of their terms, eigenvectors, Λ.

Every batch runs forward and backward once for the factors and, for `ekfac`, once more for Λ. The sums are integers, so
the result has the same bits on any number of ranks that share documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treering.curvature.capture import capture
from treering.curvature.eigen import decompose_all
from treering.curvature.exact_sums import ExactSum, Steps
from treering.curvature.factors import GradientSettings, scale_of
from treering.curvature.gradient_terms import CorrectedTerms, FactorTerms, SharedInputs, Term
from treering.curvature.measured_model import MaskedBatches, MeasuredModel, agreed
from treering.curvature.pairs import PairSink
from treering.curvature.passes import bits_of_batches, share_peaks
from treering.curvature.sums import reduced
from treering.curvature.targets import Target, TargetPairs

Key = tuple[str, Term]
Shapes = dict[Key, tuple[int, ...]]
SYMMETRIC = ("moment", "inputs", "gradients")


@dataclass(frozen=True, kw_only=True)
class MeasuredFactors:
    """What a pass gives of one weight.

    Attributes:
        pieces: tensors in float32, by piece; `moment` for the inputs alone.
        tokens: of A.
        scale: c.
    """

    weight: str
    pieces: Mapping[str, Tensor]
    tokens: Tensor
    scale: Tensor


class GradientPasses:
    """The backwards of one measurement. `prepare` comes first.

    Args:
        subject: the model.
        batches: this rank's, with the tokens that count.
        targets: what is measured, by name.
        settings: how.
        progress: called after each batch of a pass.
        counts: of an embedding, how often each token was measured; its inputs were whitened with them.

    Attributes:
        owners: weight → the one that has the same inputs.
        documents, tokens: of all ranks, known after the first pass.
    """

    def __init__(
        self,
        subject: MeasuredModel,
        batches: MaskedBatches,
        targets: Mapping[str, Target],
        settings: GradientSettings,
        progress: Callable[[], None] = lambda: None,
        counts: Mapping[str, Tensor] | None = None,
    ):
        self.subject, self.batches, self.targets = subject, batches, dict(targets)
        self.settings, self.progress, self.counts = settings, progress, dict(counts or {})
        self.pooled = settings.experts == "pooled"
        self.owners: dict[str, str] = {}
        self.documents = self.tokens = 0
        self._steps: dict[Key, Steps] = {}
        self.bits = bits_of_batches(subject, batches)

    def prepare(self) -> None:
        """Run the first batch: which weights have the same inputs, and what the sums are rounded to."""
        shapes = {key: shape for weight in self.targets for key, shape in self.shapes(weight).items()}
        kinds = {name: (target.bias is None, target.in_blocks) for name, target in self.targets.items()}
        sums, shared = self._empty(shapes, dict.fromkeys(shapes)), SharedInputs(kinds)
        given = self._run(FactorTerms(self.settings.kind, self.pooled, sums, shared), shapes, self.batches[:1])
        self.subject.agree(*given)
        self.owners = agreed({weight: shared.owner.get(weight, weight) for weight in self.targets})
        self._steps = self._chosen(sums)

    def shapes(self, weight: str) -> Shapes:
        """Return the shapes of the sums of a weight; of inputs that another weight has as well, none."""
        target, kind = self.targets[weight], self.settings.kind
        lead = () if self.pooled else target.lead
        square = (*lead, target.inputs, target.inputs)
        owner, shapes = self.owners.get(weight, weight) == weight, Shapes()
        if kind in ("kfac", "ekfac"):
            if owner:
                shapes[weight, "inputs"] = square
        else:
            shapes[weight, "inputs"], shapes[weight, "trace"] = square, (*lead, 1, 1)
            if owner and target.moment and not (self.pooled and target.lead):
                shapes[weight, "moment"] = target.moment
        if kind == "tkfac":
            shapes[weight, "cross"] = (*lead, 1, 1)
        return shapes | {(weight, "gradients"): (*lead, target.outputs, target.outputs)}

    def moment_within(self, weight: str) -> bool:
        """Return whether the moment of the plain inputs is a corner of that of inputs with a 1, of a layer's bias."""
        target = self.targets[weight]
        apart = target.bias is not None and bool(target.moment) and not (self.pooled and target.lead)
        return apart and self.settings.kind in ("kfac", "ekfac") and self.owners.get(weight, weight) == weight

    def factors(self, weights: Sequence[str]) -> Iterator[MeasuredFactors]:
        """Yield what is summed for each of `weights`, with eigenvectors and c."""
        shapes = {key: shape for weight in weights for key, shape in self.shapes(weight).items()}
        steps = {key: self._steps[key] for key in shapes}
        sums = self._exact(shapes, steps, lambda sums: FactorTerms(self.settings.kind, self.pooled, sums))
        means: dict[Key, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for key in shapes:
            total, tokens = sums.pop(key).sum(self.subject.groups)
            weight, term = key
            per_document = term == "trace" or (self.settings.kind == "shampoo" and term != "moment")
            count = torch.tensor(self._documents(weight)) if per_document else tokens.clamp_min(1)
            means[key] = total / count[..., None, None]
            counts[weight] = tokens if term == "moment" or weight not in counts else counts[weight]
        sides = ((key, mean.float()) for key, mean in means.items() if key[1] in ("inputs", "gradients"))
        bases = dict(decompose_all(sides, self.subject.device))
        for weight in weights:
            pieces: dict[str, Tensor] = {}
            for term in ("moment", "inputs", "gradients"):
                if (weight, term) in means:
                    pieces[term] = means[weight, term].float().contiguous()
                elif term == "moment" and (weight, "inputs") in means and self.moment_within(weight):
                    width = self.targets[weight].inputs - 1
                    pieces[term] = means[weight, "inputs"][..., :width, :width].float().contiguous()
                if (weight, term) in bases:
                    pieces[f"{term}.vectors"], pieces[f"{term}.values"] = bases[weight, term]
            yield MeasuredFactors(
                weight=weight, pieces=pieces, tokens=counts[weight], scale=self._scale(weight, counts[weight], means)
            )

    def corrected(
        self, weights: Sequence[str], basis: Callable[[str], tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (weight, Λ), the mean over documents, of `weights`.

        Args:
            basis: the eigenvectors of a weight's inputs and gradients.
        """
        bases = {weight: basis(weight) for weight in weights}
        shapes: Shapes = {(weight, "corrected"): self.corrected_shape(weight) for weight in weights}
        first = self._empty(shapes, dict.fromkeys(shapes))
        self._run(CorrectedTerms(bases, self.pooled, first), shapes, self.batches[:1])
        sums = self._exact(shapes, self._chosen(first), lambda sums: CorrectedTerms(bases, self.pooled, sums))
        for weight, _ in shapes:
            total, _ = sums.pop((weight, "corrected")).sum(self.subject.groups)
            yield weight, (total / self._documents(weight)).float().contiguous()

    def corrected_shape(self, weight: str) -> tuple[int, ...]:
        """Return the shape of Λ."""
        target = self.targets[weight]
        return (*(() if self.pooled else target.lead), target.outputs, target.inputs)

    def _documents(self, weight: str) -> int:
        """Return N; times the number of experts that are pooled, each of which has a gradient of every document."""
        lead = self.targets[weight].lead
        return self.documents * (lead[0] if self.pooled and lead else 1)

    def _scale(self, weight: str, tokens: Tensor, means: Mapping[Key, Tensor]) -> Tensor:
        zero = torch.zeros(1, 1, dtype=torch.float64)
        trace, cross = (means.get((weight, term), zero)[..., 0, 0] for term in ("trace", "cross"))  # type: ignore[arg-type]
        return scale_of(self.settings.kind, self._documents(weight), tokens, trace, cross)

    def _exact(
        self, shapes: Shapes, steps: Mapping[Key, Steps], terms: Callable[[dict[Key, ExactSum]], PairSink]
    ) -> dict[Key, ExactSum]:
        """Return the sums over all batches, in `steps` or, where they do not fit, in steps that fit all batches."""
        while True:
            sums = self._empty(shapes, steps)
            self._run(terms(sums), shapes, self.batches)
            larger = {key: one.larger_steps(key[0], self.subject.groups) for key, one in sums.items()}
            if not any(larger.values()):
                return sums
            steps = {**steps, **{key: one for key, one in larger.items() if one is not None}}

    def _empty(self, shapes: Shapes, steps: Mapping[Key, Steps | None]) -> dict[Key, ExactSum]:
        return {
            key: ExactSum.empty(shape, self.subject.device, steps[key], symmetric=key[1] in SYMMETRIC)
            for key, shape in shapes.items()
        }

    def _chosen(self, sums: Mapping[Key, ExactSum]) -> dict[Key, Steps]:
        """Return the steps of all sums by what rank 0 has seen. A collective."""
        share_peaks(sums.values())
        return {key: one.chosen(self.bits) for key, one in sums.items()}

    def _run(self, sink: PairSink, shapes: Shapes, batches: MaskedBatches) -> tuple[int, int]:
        """Run forward and backward over batches. Returns how many tokens they have and how many of them were seen."""
        targets = [self.targets[name] for name in dict.fromkeys(name for name, _ in shapes)]
        weights = {target.weight for target in targets}
        documents = given = seen_tokens = 0
        with capture(self.subject.model, self.subject.anatomy, weights, TargetPairs(targets, sink)) as seen:
            for batch, real in batches:
                numbers, here = self.subject.backward(seen, batch, real, self.settings.labels, self.settings.seed)
                documents += int((numbers.unique() >= 0).sum())
                given += int((numbers >= 0).sum())
                seen_tokens += here
                if batches is self.batches:
                    self.progress()
        if batches is self.batches and not self.documents:
            counts = torch.tensor([documents, given], device=self.subject.device)
            self.documents, self.tokens = reduced(counts, self.subject.data_groups).tolist()
        return given, seen_tokens
