"""The gradient side of a measurement: for each weight, a Kronecker-factored approximation of the Fisher information.

G_n the gradient of document n, N outputs × M inputs. The average of vec(G_n) vec(G_n)ᵀ over documents is taken as

    H = c · S ⊗ A,      A = Q_A diag(E_A) Q_Aᵀ (inputs, M × M),   S = Q_S diag(E_S) Q_Sᵀ (gradients, N × N)

whose eigenvalues are c · E_S[i] · E_A[j] at Q_S[:, i] Q_A[:, j]ᵀ; or, for `ekfac`, the measured Λ[i, j] in that basis.
Of a stack of experts all of it has a leading dimension E, or not, where they are pooled.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from treering.core.errors import ConfigError
from treering.curvature.entry import Entry
from treering.curvature.vocabulary import VOCABULARY, Cover, Coverage

Kind = Literal["kfac", "ekfac", "shampoo", "tkfac"]
Labels = Literal["sampled", "data"]
Piece = Literal["inputs", "gradients", "inputs.vectors", "inputs.values", "gradients.vectors", "gradients.values"]
CORRECTED = "corrected"
COUNTS = "counts"  # of an embedding: how often each token was measured


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """What is measured of gradients, and how.

    Attributes:
        kind: `kfac`, `ekfac`, `shampoo` or `tkfac`; see `gradient_terms`.
        labels: `sampled` from the model's own prediction, which gives the Fisher information, or those of the `data`.
        experts: `each` expert of a stack has factors of its own, or they are `pooled`.
        seed: of the labels.
        cover: matrices inside the `blocks`, or `all`: biases, norms, routers, embedding and head as well.
        vocabulary: with `all`, numbers that are kept of a side as wide as the vocabulary.
    """

    kind: Kind = "ekfac"
    labels: Labels = "sampled"
    experts: Literal["each", "pooled"] = "each"
    seed: int = 0
    cover: Cover = "blocks"
    vocabulary: int = VOCABULARY

    def __post_init__(self) -> None:
        if self.cover not in ("blocks", "all"):
            raise ConfigError(f"cover is {self.cover!r}; it is blocks or all", field="cover")
        if type(self.vocabulary) is not int or self.vocabulary < 1:
            raise ConfigError(f"vocabulary is {self.vocabulary!r}; it is a number from 1", field="vocabulary")

    def described(self) -> dict[str, Any]:
        """Return the settings as plain data; without what is of `all`, as files were written before there was it."""
        fields = asdict(self)
        return fields if self.cover == "all" else {n: fields[n] for n in ("kind", "labels", "experts", "seed")}


@dataclass(frozen=True, kw_only=True)
class MatrixFactors:
    """The factors of one weight.

    Attributes:
        weight: its plain name.
        scale: c, one number or, of a stack, one for each expert.
        keys: piece → the name under which its tensor is stored. Weights with the same inputs share tensors.
    """

    weight: str
    scale: Tensor
    keys: Mapping[str, str]
    read: Callable[[str], Tensor]

    def basis(self, side: Literal["inputs", "gradients"]) -> tuple[Tensor, Tensor]:
        """Return the eigenvectors of one side, as columns, and the eigenvalues, ascending."""
        return self.read(self.keys[f"{side}.vectors"]), self.read(self.keys[f"{side}.values"])

    @property
    def corrected(self) -> bool:
        """Whether Λ is there."""
        return CORRECTED in self.keys

    def eigenvalues(self) -> Tensor:
        """Return Λ, or c · E_S ⊗ E_A where it was not measured, […, N, M]."""
        if self.corrected:
            return self.read(self.keys[CORRECTED])
        E_A, E_S = (self.read(self.keys[f"{side}.values"]) for side in ("inputs", "gradients"))
        return self.scale.to(E_A.dtype)[..., None, None] * E_S[..., :, None] * E_A[..., None, :]


class GradientFactors(Mapping[str, MatrixFactors]):
    """factors["model.layers.0.mlp.up_proj.weight"] are the factors of that weight; tensors are read when asked for.

    Attributes:
        settings: how they were measured.
        documents, tokens: of how many.
        model: a digest of the weights that they were measured on.
        left_out: weight → why it has no factors.
        entries: the tensors of all pieces, by the name under which each is stored.
    """

    def __init__(
        self,
        *,
        settings: GradientSettings,
        documents: int,
        tokens: int,
        model: str,
        weights: Mapping[str, MatrixFactors],
        left_out: Mapping[str, str],
        entries: Mapping[str, Entry],
    ):
        self.settings, self.documents, self.tokens, self.model = settings, documents, tokens, model
        self._weights, self.left_out, self.entries = dict(weights), dict(left_out), dict(entries)

    def __getitem__(self, weight: str) -> MatrixFactors:
        return self._weights[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def complete(self) -> bool:
        """Whether everything is there that the settings ask for: a measurement may have ended before Λ."""
        return self.settings.kind != "ekfac" or all(one.corrected for one in self._weights.values())

    def unfit(self, curvature: str, cover: Cover) -> str:
        """Return why gradients cannot be whitened with these factors as asked, and how to measure; empty: they can.

        The factors of ekfac are those of kfac, and Λ.
        """
        kind, covered = self.settings.kind, self.settings.cover
        if curvature != kind and (curvature, kind) != ("kfac", "ekfac"):
            return f"the gradients were measured for {kind}, not for {curvature}; measure with --gradients {curvature}"
        if not self.complete:
            return f"the measurement of {kind} ended before its correction; run treering measure again, to its end"
        if covered != cover:
            return f"they were measured with cover {covered}, not {cover}; measure with --cover {cover}"
        return ""

    @property
    def digest(self) -> str:
        """A digest of all values, scales and settings: what an index is bound to."""
        values = [
            [weight, one.scale.tolist(), {piece: self.entries[key].digest for piece, key in sorted(one.keys.items())}]
            for weight, one in sorted(self._weights.items())
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.described(), values]).encode())

    def described(self) -> dict[str, Any]:
        """Return how they were measured as plain data."""
        facts = {"documents": self.documents, "tokens": self.tokens, "model": self.model}
        return {**self.settings.described(), **facts}

    @property
    def coverage(self) -> Coverage:
        """What they cover, with the counts of tokens that an embedding was whitened with."""
        counted = {w: one.read(one.keys[COUNTS]) for w, one in self._weights.items() if COUNTS in one.keys}
        return Coverage(of=self.settings.cover, vocabulary=self.settings.vocabulary, counts=counted)


def scale_of(kind: Kind, documents: int, tokens: Tensor, trace: Tensor, cross: Tensor) -> Tensor:
    """Return c, for A and S that are means per token (kfac, ekfac, tkfac) or per document (shampoo).

    Args:
        documents: N; times the number of experts, where sums are pooled over them.
        tokens: T, or of each expert.
        trace: Σ_n ‖G_n‖² / N, which the trace of H equals. Not of kfac and ekfac.
        cross: Σ_t ‖a_t‖² ‖g_t‖² / T, of tkfac.
    """
    if kind in ("kfac", "ekfac"):
        return tokens.double() / documents
    product = trace if kind == "shampoo" else cross
    return torch.where(product > 0, trace / product.square().clamp_min(1e-300), 0.0)
