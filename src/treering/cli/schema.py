"""The complete configuration of a run: the sections of the YAML file.

The sections of techniques are built from the list in `treering.techniques`.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from treering.core.errors import ConfigError
from treering.data.config import Data
from treering.technique import Technique
from treering.techniques import TECHNIQUES
from treering.train.config import Model, ObjectiveSection, StatisticsSection, Train


class _Sections:
    """The techniques of a run. A name without a value (`shard:`) means that technique with its defaults."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not isinstance(value, tuple):
                continue
            names = [one.name for one in value]
            if not names:
                raise ConfigError(f"{key} is an empty list; leave it out, or name an adapter", field=key)
            for i, name in enumerate(names):
                if name in names[:i]:
                    message = f"two adapters are named {name!r}; give each another name"
                    raise ConfigError(message, field=f"{key}[{i}].name")

    def chosen(self) -> tuple[Technique, ...]:
        """Return the techniques that are on, each adapter as a separate one. `compose` puts them in order."""
        values = (value if isinstance(value, tuple) else (value,) for value in vars(self).values())
        return tuple(one for several in values for one in several if one is not None)


def _section(key: str, cls: Any) -> tuple[str, Any, Any]:
    """Return the field of one technique, None where it is off. One that has a `name` may be given as a list."""
    several = any(f.name == "name" for f in fields(cls))
    meaning = (cls.__doc__ or "").partition("\n")[0] + (" A list: several, each with a name." if several else "")
    annotation = cls | tuple[cls, ...] | None if several else cls | None
    return key, annotation, field(default=None, metadata={"meaning": meaning})


if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class Techniques(_Sections):
        def __getattr__(self, name: str) -> Any: ...

else:
    Techniques = make_dataclass(
        "Techniques",
        [_section(key, cls) for key, cls in TECHNIQUES.items()],
        bases=(_Sections,),
        namespace={"__doc__": _Sections.__doc__, "__module__": __name__},
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How ranks are laid out; the product is the number of ranks, and one size may be -1 for the rest."""

    replicate: int = 1
    shard: int = -1
    sequence: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = {"replicate": self.replicate, "shard": self.shard, "sequence": self.sequence, "expert": self.expert}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"{name} is {size}; it is at least 1, or -1 for the rest", field=name)
        rest = [name for name, size in sizes.items() if size == -1 and name != "expert"]
        if len(rest) > 1:
            raise ConfigError(f"{' and '.join(rest)} are both -1; only one can take the rest", field=rest[-1])


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a model, data, techniques, how to train, on which mesh, and the output folder."""

    model: Model
    data: Data
    techniques: Techniques = field(default_factory=Techniques)
    train: Train = field(default_factory=Train)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    statistics: StatisticsSection = field(default_factory=StatisticsSection)
    mesh: Mesh = field(default_factory=Mesh)
    output: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise ConfigError("output is empty; name the folder for checkpoints and metrics", field="output")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it cannot be negative", field="seed")
