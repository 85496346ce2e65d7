"""Configuration values as mappings, lists and scalars."""

import dataclasses
from typing import Any

from treering.cli.parsing.shape import Key, keys, null_is_defaults


def plain_values(value: Any) -> Any:
    """`value` with dataclasses as mappings and tuples as lists; what is switched off is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = keys(type(value))
        return {k: plain_values(getattr(value, k)) for k in own if not _off(own[k], getattr(value, k))}
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_values(v) for v in value]
    return value


def _off(key: Key, value: Any) -> bool:
    # Written as null it would be read as "with its defaults".
    return value is None and null_is_defaults(key)
