"""The technique that keeps quantized weights as their folder stores them, named by the user or not."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from treering.plan import open_model
from treering.technique import StoredTensor, Technique
from treering.weights.plain_tensors import Source


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


def kept_of_folder(techniques: Iterable[Technique], path: str, dtype: str, *, decode: bool) -> tuple[Technique, ...]:
    """Return `keep_stored` for the folder or hub name `path`: for planning without weights.

    Args:
        dtype: see `draft`.
        decode: whether quantized weights are decoded instead.
    """
    folder: Path = open_model.locate(path)
    quantized = open_model.quantized_weights(folder, decode=decode)
    if quantized is None:
        return keep_stored(techniques, None)
    model = open_model.on_meta(folder, dtype)
    return keep_stored(techniques, open_model.source_of(model, folder, quantized, keep=not decode))
