"""Rotary embeddings whose frequencies depend on the longest position in the batch: there, documents see each other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def rope_conflict(config: Any, lengths: Sequence[int]) -> str | None:
    """Why these documents cannot share a row, or None.

    longrope  changes its frequencies for all tokens as soon as one position is past the original length
    dynamic   stretches them with the longest position, for all tokens
    """
    if len(lengths) == 1:
        return None
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in ("longrope", "dynamic"):
            continue
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        beyond = sum(length > limit for length in lengths)
        if beyond and (kind == "dynamic" or beyond < len(lengths)):
            return (
                f"{beyond} of {len(lengths)} packed documents are longer than {limit} tokens, and this model's {kind} "
                "rotary embedding would then change the others too; pack documents of at most that length, or switch "
                "packing off"
            )
    return None


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """One mapping, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (rope for rope in parameters.values() if isinstance(rope, Mapping))
