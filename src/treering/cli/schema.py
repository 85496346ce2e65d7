"""The configuration of a run: the sections of the YAML file, and the literal table technique name → class."""

from dataclasses import dataclass, field

from treering.core.errors import ConfigError
from treering.data.config import Data
from treering.technique import Technique
from treering.techniques.compile import Compile
from treering.techniques.full import Full
from treering.techniques.lora import LoRA
from treering.techniques.osft import OSFT
from treering.techniques.recompute import Recompute
from treering.techniques.shard import Shard
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP
from treering.train.config import Model, Statistics, Train


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """What is done to the model. A name with nothing behind it (`shard:`) means that technique with its defaults."""

    full: Full | None = None
    lora: LoRA | tuple[LoRA, ...] | None = None  # a list: several adapters, each with a name
    osft: OSFT | None = None
    tiledmlp: TiledMLP | None = None
    tiledblock: TiledBlock | None = None
    tiledloss: TiledLoss | None = None
    recompute: Recompute | None = None
    shard: Shard | None = None
    compile: Compile | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lora, tuple):
            names = [adapter.name for adapter in self.lora]
            if not names:
                raise ConfigError("lora is an empty list; leave it out, or name an adapter", field="lora")
            for i, name in enumerate(names):
                if name in names[:i]:
                    message = f"two adapters are named {name!r}; give each a name of its own"
                    raise ConfigError(message, field=f"lora[{i}].name")

    def chosen(self) -> tuple[Technique, ...]:
        """Return the techniques that are switched on, each adapter by itself. `compose` puts them in order."""
        adapters = self.lora if isinstance(self.lora, tuple) else (self.lora,)
        tiled = (self.tiledmlp, self.tiledblock, self.tiledloss)
        rest = (self.osft, *tiled, self.recompute, self.shard, self.compile)
        return tuple(t for t in (self.full, *adapters, *rest) if t is not None)


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
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ConfigError(f"{' and '.join(rest)} are both -1; only one can take the rest", field=rest[-1])


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a model, data, techniques, how to train, on which mesh, and the folder that everything goes to."""

    model: Model
    data: Data
    techniques: Techniques = field(default_factory=Techniques)
    train: Train = field(default_factory=Train)
    statistics: Statistics = field(default_factory=Statistics)
    mesh: Mesh = field(default_factory=Mesh)
    output: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise ConfigError("output is empty; name the folder for checkpoints and metrics", field="output")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it cannot be negative", field="seed")
