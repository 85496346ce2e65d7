"""One training run as a value: what the command line makes of a file, and what a program can write itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from treering.data.config import Data
from treering.technique import Technique
from treering.train.config import Model, Statistics, Train


@dataclass(frozen=True, kw_only=True)
class Job:
    model: Model
    data: Data
    techniques: tuple[Technique, ...]
    output: str
    train: Train = field(default_factory=Train)
    statistics: Statistics = field(default_factory=Statistics)
    mesh: Mapping[str, int] = field(default_factory=dict)  # keywords of treering.mesh
    seed: int = 0
    written: str = ""  # the resolved configuration as text, kept beside the run
