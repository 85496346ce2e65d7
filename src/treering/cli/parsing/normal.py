"""Shorthands written out: `model: gpt2` and `shard:` as the sections that they stand for."""

from typing import Any

from treering.cli.parsing.shape import child, chosen, keys, null_is_defaults, section, shorthand


def normal(annotation: Any, value: Any) -> Any:
    """`value` with every shorthand below `annotation` written out."""
    if isinstance(value, str) and (short := shorthand(annotation)):
        return {short: value}
    if isinstance(value, list):
        return [_below(annotation, i, v, value) for i, v in enumerate(value)]
    if isinstance(value, dict):
        arm = chosen(annotation, value)
        own = keys(arm) if arm is not None and arm is section(annotation) else {}
        written = {k: {} if v is None and k in own and null_is_defaults(own[k]) else v for k, v in value.items()}
        return {k: _below(annotation, k, v, value) for k, v in written.items()}
    return value


def _below(annotation: Any, step: str | int, value: Any, around: Any) -> Any:
    inner = child(annotation, step, around)
    return value if inner is None else normal(inner, value)
