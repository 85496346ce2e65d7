"""Former names of settings: a field of a settings dataclass declares the names that it had before.

    damping: float = field(default=0.01, metadata={FORMERLY: ("soften",)})

Configuration files and checkpoints that were written with a former name are still read; constructors refuse it.
"""

import dataclasses
import functools
import re
from typing import Any, TypeVar

from treering.core.errors import ConfigError

FORMERLY = "formerly"  # the key in a field's metadata; its value is a tuple of names
T = TypeVar("T")


def former_names(cls: type) -> dict[str, str]:
    """Return former name → today's name of every renamed setting of `cls`; nothing if it is not a dataclass."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {name: f.name for f in fields for name in f.metadata.get(FORMERLY, ())}


def with_current_names(cls: type, text: str) -> str:
    """Return `text`, the repr of an instance of `cls` that an earlier version wrote, with today's names."""
    if text.startswith(f"{cls.__name__}("):
        for former, name in former_names(cls).items():
            text = re.sub(rf"(?<=[( ]){former}=", f"{name}=", text)
    return text


def refuse_former_names(cls: type[T]) -> type[T]:
    """Make the constructor of the dataclass `cls` name today's setting when it is given a former one."""
    initialise: Any = cls.__init__
    former = former_names(cls)

    @functools.wraps(initialise)
    def __init__(self: T, **settings: Any) -> None:
        for name in former.keys() & settings:
            raise ConfigError(f"{cls.__name__}({name}=…): {name} is now called {former[name]}", field=former[name])
        initialise(self, **settings)

    cls.__init__ = __init__  # type: ignore[method-assign,assignment]
    return cls
