"""index.json: the recipe of an index, and its shards with their digests; building.json: the recipe alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError
from treering.sketches import shards
from treering.sketches.recipe import IndexRecipe, from_json
from treering.sketches.shards import ShardEntry
from treering.store.untrusted import read_json

FORMAT = 1
NAME, BUILDING = "index.json", "building.json"
_VALUES = ("documents", "tokens", "shards")


def description(recipe: IndexRecipe, entries: Sequence[ShardEntry]) -> dict[str, Any]:
    """Return the content of index.json."""
    return {
        "format": FORMAT,
        "recipe": recipe.as_json(),
        "documents": sum(entry.documents for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "shards": [asdict(entry) for entry in entries],
    }


def read_recipe(path: Path, names: Sequence[str] = ()) -> tuple[IndexRecipe, dict[str, Any]]:
    """Return the recipe in index.json or building.json, and the other values that it must have."""
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has the format {str(value.get('format'))[:40]!r}, and this version reads {FORMAT}; build the "
            "index again, or use the version that wrote it"
        )
    try:
        if unknown := sorted(set(value) - {"format", "recipe", *names}):
            raise ValueError(f"{unknown[0][:80]!r}, which this version does not know")
        return from_json(value["recipe"]), {name: value[name] for name in names}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from None


def read_index(path: Path) -> tuple[IndexRecipe, tuple[ShardEntry, ...]]:
    """Return the recipe and the shards that index.json lists."""
    recipe, values = read_recipe(path, _VALUES)
    try:
        entries = tuple(_entry(number, given) for number, given in enumerate(values["shards"]))
        for name in ("documents", "tokens"):
            if values[name] != sum(getattr(entry, name) for entry in entries):
                raise ValueError(f"the number of {name}")
        if not entries:
            raise ValueError("no shard")
        return recipe, entries
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error of a JSON file that cannot be used."""
    return CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); {shards.REMEDY}")


def _entry(number: int, given: Mapping[str, Any]) -> ShardEntry:
    if set(given) != {"file", "documents", "tokens", "bytes", "digest"}:
        raise ValueError(f"the fields of shard {number}")
    counts = (given["documents"], given["tokens"], given["bytes"])
    if given["file"] != shards.name_of(number) or not isinstance(given["digest"], str):
        raise ValueError(f"the file of shard {number}")
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"the sizes of shard {number}")
    return ShardEntry(**given)


def as_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode()
