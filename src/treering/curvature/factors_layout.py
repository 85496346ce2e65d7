"""The gradient side of a measurement in its JSON: written, and read with every field checked."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from treering.curvature.entry import Entry
from treering.curvature.factors import CORRECTED, COUNTS, GradientFactors, GradientSettings, MatrixFactors, Piece
from treering.curvature.vocabulary import VOCABULARY

PIECES = (*get_args(Piece), CORRECTED, COUNTS)
_CHOICES = {
    "kind": ("kfac", "ekfac", "shampoo", "tkfac"),
    "labels": ("sampled", "data"),
    "experts": ("each", "pooled"),
}


def described(
    settings: GradientSettings, documents: int, tokens: int, model: str, left_out: Mapping[str, str],
    weights: Mapping[str, tuple[Tensor, Mapping[str, str]]],
) -> dict[str, Any]:  # fmt: skip
    """Return what is written. `weights`: (c, keys of the pieces) of each."""
    return {
        **settings.described(),
        "documents": documents,
        "tokens": tokens,
        "model": model,
        "left_out": dict(left_out),
        "weights": described_weights(weights),
    }


def described_weights(weights: Mapping[str, tuple[Tensor, Mapping[str, str]]]) -> dict[str, Any]:
    """Return what is written of weights: (c, keys of the pieces) of each."""
    return {name: {"scale": scale.tolist(), "keys": dict(keys)} for name, (scale, keys) in weights.items()}


def entries(description: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the tensors of all pieces, by key. ValueError or KeyError where a field is not what it must be."""
    gradients = description.get("gradients") or {"weights": {}}
    keys = {str(key) for one in gradients["weights"].values() for key in one["keys"].values()}
    return {key: _entry(key, description["tensors"][key]) for key in sorted(keys)}


def factors(
    description: Mapping[str, Any], pieces: Mapping[str, Entry], read: Callable[[Entry], Tensor]
) -> GradientFactors | None:
    """Return the gradient side; None: there is none."""
    gradients = description.get("gradients")
    if gradients is None:
        return None
    for name, choices in _CHOICES.items():
        if gradients[name] not in choices:
            raise ValueError(f"gradients.{name} is {str(gradients[name])[:40]!r}")
    for name in ("documents", "tokens", "seed"):
        if type(gradients[name]) is not int or abs(gradients[name]) >= 1 << 64:
            raise ValueError(f"gradients.{name} is {str(gradients[name])[:40]!r}")
    if gradients.get("cover", "blocks") not in ("blocks", "all"):
        raise ValueError(f"gradients.cover is {str(gradients['cover'])[:40]!r}")
    vocabulary = gradients.get("vocabulary", VOCABULARY)
    if type(vocabulary) is not int or not 1 <= vocabulary < 1 << 31:
        raise ValueError(f"gradients.vocabulary is {str(vocabulary)[:40]!r}")
    settings = GradientSettings(
        **{n: gradients[n] for n in ("kind", "labels", "experts", "seed")},
        cover=gradients.get("cover", "blocks"),
        vocabulary=vocabulary,
    )
    weights = {}
    for weight, one in gradients["weights"].items():
        keys = {str(piece): str(key) for piece, key in one["keys"].items()}
        if set(keys) - set(PIECES) or set(get_args(Piece)) - set(keys):
            raise ValueError(f"the pieces of {str(weight)[:80]!r}")
        _check_shapes(str(weight), keys, pieces)
        numbers = one["scale"] if isinstance(one["scale"], list) else [one["scale"]]
        if not all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers):
            raise ValueError(f"the scale of {str(weight)[:80]!r}")
        scale = torch.tensor(one["scale"], dtype=torch.float64)
        weights[str(weight)] = MatrixFactors(
            weight=str(weight), scale=scale, keys=keys, read=lambda key: read(pieces[key])
        )
    return GradientFactors(
        settings=settings,
        documents=gradients["documents"],
        tokens=gradients["tokens"],
        model=str(gradients["model"]),
        weights=weights,
        left_out={str(name): str(reason) for name, reason in gradients["left_out"].items()},
        entries=pieces,
    )


def _entry(key: str, tensor: Mapping[str, Any]) -> Entry:
    shape = tuple(tensor["shape"])
    texts = all(isinstance(tensor[name], str) for name in ("digest", "file"))
    if not (all(type(n) is int and 0 < n < 1 << 62 for n in shape) and texts):
        raise ValueError(f"the entry of {key[:80]!r}")
    return Entry(key=key, tokens=0, shape=shape, digest=tensor["digest"], file=tensor["file"])


def _check_shapes(weight: str, keys: Mapping[str, str], pieces: Mapping[str, Entry]) -> None:
    shape = {piece: pieces[key].shape for piece, key in keys.items()}
    good = all(
        shape[side] == shape[f"{side}.vectors"] == (*shape[f"{side}.values"], shape[side][-1])
        for side in ("inputs", "gradients")
    )
    if CORRECTED in keys:
        good = good and shape[CORRECTED][-2:] == (shape["gradients"][-1], shape["inputs"][-1])
    if COUNTS in keys:
        good = good and len(shape[COUNTS]) == 1
    if not good:
        raise ValueError(f"the shapes of {weight[:80]!r}")
