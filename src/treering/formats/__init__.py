"""Number formats: a weight as codes and scales and back, pure functions with exact inverses."""

from collections.abc import Callable, Mapping
from typing import Any

from treering.core.errors import ConfigError
from treering.formats.float8 import FP8, FP8Block
from treering.formats.fp4 import MXFP4, NVFP4
from treering.formats.integer import Integer
from treering.formats.layout import Format, Piece
from treering.formats.nf4 import NF4

__all__ = ["FP8", "MXFP4", "NAMED", "NF4", "NVFP4", "FP8Block", "Format", "Integer", "Piece", "from_settings", "named"]

_CLASSES: tuple[type[Format], ...] = (Integer, FP8, FP8Block, NF4, MXFP4, NVFP4)

# What a configuration may ask for; the settings of each are its class's.
NAMED: Mapping[str, Callable[..., Format]] = {
    "int8": lambda **settings: Integer(**{"width": 8, "group": 0} | settings),
    "int4": lambda **settings: Integer(**{"width": 4, "group": 128} | settings),
    "int3": lambda **settings: Integer(**{"width": 3, "group": 128} | settings),
    "fp8": FP8,
    "fp8_block": FP8Block,
    "nf4": NF4,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}


def named(name: str, **settings: Any) -> Format:
    """Return the format that a configuration names, with its settings.

    Example:
        >>> named("int4", group=32)
        Integer(width=4, group=32, scale_dtype='float32', asymmetric=False)
    """
    if name not in NAMED:
        raise ConfigError(f"{name!r} is no number format; there are {', '.join(NAMED)}", field="format")
    return _made(NAMED[name], name, settings)


def from_settings(settings: Mapping[str, Any]) -> Format:
    """Return the format that `Format.settings` described."""
    name = settings.get("format")
    for kind in _CLASSES:
        if kind.name == name:
            return _made(kind, kind.name, {key: value for key, value in settings.items() if key != "format"})
    raise ConfigError(f"{name!r} is no stored number format; there are {', '.join(k.name for k in _CLASSES)}")


def _made(kind: Callable[..., Format], name: str, settings: Mapping[str, Any]) -> Format:
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigError(f"number format {name}: {error}", field="format") from None
