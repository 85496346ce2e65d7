"""Writes a configuration with every default, as YAML that is read as the same configuration."""

import dataclasses
import re
from typing import Any

import yaml

from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.parsing.sections import keys, null_is_defaults
from treering.cli.text import masked

_SIMPLE = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@-]*( [A-Za-z0-9_/.+@(][A-Za-z0-9_/.+@()-]*)*")


class _Dumper(yaml.SafeDumper):
    """Quotes what our rules, or YAML 1.1's in other people's tools, would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        unquoted = _SIMPLE.fullmatch(text) is not None and resolve(text) == text
    except ScalarError:
        unquoted = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if unquoted else '"')


_Dumper.add_representer(str, _text)


def to_yaml(config: Any) -> str:
    """Return `config` as YAML with all defaults; values that look like secrets are masked."""
    values = _mask(plain_values(config))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


def plain_values(value: Any) -> Any:
    """Return `value` with dataclasses as mappings and tuples as lists; what is switched off is omitted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = [(key, getattr(value, key.name)) for key in keys(type(value)).values()]
        # Null would be read as "with its defaults".
        return {key.name: plain_values(v) for key, v in values if not (v is None and null_is_defaults(key))}
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_values(v) for v in value]
    return value


def _mask(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _mask(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_mask(v, key) for v in value]
    return masked(key, value)
