"""A configuration written out with every default, as YAML that reads back as the same configuration."""

import re
from typing import Any

import yaml

from treering.cli.parsing.plain import plain_values
from treering.cli.parsing.scalars import ScalarError, resolve
from treering.cli.text import masked

_SIMPLE = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@-]*( [A-Za-z0-9_/.+@(][A-Za-z0-9_/.+@()-]*)*")


class _Dumper(yaml.SafeDumper):
    """Quotes what our rules, or YAML 1.1's in other people's tools, would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        plain = _SIMPLE.fullmatch(text) is not None and resolve(text) == text
    except ScalarError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def to_yaml(config: Any) -> str:
    """`config` as YAML, all defaults written, what looks like a secret masked."""
    values = _mask(plain_values(config))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


def _mask(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _mask(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_mask(v, key) for v in value]
    return masked(key, value)
