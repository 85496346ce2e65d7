"""Settings that were renamed or added: a field of a settings dataclass declares what earlier versions wrote.

    damping: float = field(default=0.01, metadata={FORMERLY: ("soften",)})
    precision: str = field(default="bfloat16", metadata={BEFORE: "float32"})

Configuration files and checkpoints that were written with a former name are still read; constructors refuse it. A
checkpoint without a setting is one of a run that did what its value `BEFORE` does. A run that resumes keeps settings
with `BEGUN` as it began, where they are left to a default that has changed since.
"""

import ast
import dataclasses
import functools
import re
from typing import Any, TypeVar

from treering.core.errors import ConfigError

FORMERLY = "formerly"  # the key in a field's metadata; its value is a tuple of names
BEGUN = "begun"  # the key in a field's metadata: True where a run keeps what it began with although the default changed
BEFORE = "before"  # the key in a field's metadata; its value is what was done before there was the setting
T = TypeVar("T")


def former_names(cls: type) -> dict[str, str]:
    """Return former name → today's name of every renamed setting of `cls`; nothing if it is not a dataclass."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {name: f.name for f in fields for name in f.metadata.get(FORMERLY, ())}


def with_current_names(cls: type, text: str) -> str:
    """Return `text`, the repr of an instance of `cls` that an earlier version wrote, as today's version writes it: with
    today's names, and with settings that did not exist."""
    if text.startswith(f"{cls.__name__}("):
        for former, name in former_names(cls).items():
            text = re.sub(rf"(?<=[( ]){former}=", f"{name}=", text)
        for f in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
            if BEFORE in f.metadata and not re.search(rf"[( ]{f.name}=", text):
                text = f"{text[:-1]}, {f.name}={f.metadata[BEFORE]!r})"
    return text


def as_begun(value: T, text: str) -> T:
    """Return the settings `value`, as a run that resumes has to have them.

    A field with `BEGUN` that has its default takes the value from `text`, the repr of the settings with which the run
    began, maybe by an earlier version with another default.
    """
    try:
        call = ast.parse(with_current_names(type(value), text), mode="eval").body
        written = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if isinstance(call, ast.Call) else {}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value
    fields = [f for f in dataclasses.fields(value) if BEGUN in f.metadata]  # type: ignore[arg-type]
    taken = {
        f.name: written[f.name]
        for f in fields
        if getattr(value, f.name) == f.default and f.name in written and isinstance(written[f.name], type(f.default))
    }
    return dataclasses.replace(value, **taken) if taken else value  # type: ignore[type-var]


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
