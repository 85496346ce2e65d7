"""The settings of training, and the job: plain frozen dataclasses, no torch, checked in their constructors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from treering.core.errors import ConfigError
from treering.data.config import Data
from treering.objectives import Distill, Objective
from treering.technique import Technique


def _positive(value: float | int | None, name: str) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name} is {value}; it must be greater than 0", field=name)


def _fraction(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; it must lie between 0 and 1", field=name)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The update rule. `muon` steps the matrices inside the blocks with Muon and everything else with AdamW."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 1e-5
    betas: tuple[float, float] | None = None  # of AdamW, also for what muon leaves to it; default 0.9 and 0.95
    eps: float | None = None  # of AdamW; default 1e-8
    momentum: float | None = None  # of sgd (default 0) and muon (default 0.95)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _positive(self.lr, "lr")
        _positive(self.eps, "eps")
        for name, unused in (("betas", "sgd"), ("eps", "sgd"), ("momentum", "adamw")):
            if getattr(self, name) is not None and self.name == unused:
                raise ConfigError(f"{name} is set, and {unused} has none; leave it out", field=name)
        for i, beta in enumerate(self.betas or ()):
            if not 0 <= beta < 1:
                raise ConfigError(f"betas[{i}] is {beta}; it must be at least 0 and below 1", field="betas")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it cannot be negative", field="weight_decay")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a pure function of the step: warm-up, then `name`, ending at `final` of the peak.

    `warmup` and `decay` are fractions of all steps below 1 and numbers of steps from 1 on; `decay` is used by `wsd`.
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.03
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it cannot be negative", field=name)
        _fraction(self.final, "final")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When to evaluate on `data.eval`, and when to stop because of it."""

    every: int | None = None  # steps; the end is always evaluated if there is eval data
    patience: int | None = None  # stop after so many evaluations without improvement
    prompts: tuple[str, ...] = ()  # sample generations are printed for these
    new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("every", "patience", "new_tokens"):
            _positive(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, how many checkpoints to keep, and whether to resume from the newest one."""

    every: int | None = None  # steps; the end is always saved
    keep: int = 2  # the newest so many, and the best evaluated one if it was saved
    best: bool = False  # also save whenever an evaluation is the best so far
    asynchronous: bool = False  # write while training continues, from a copy in host memory
    force: bool = False  # resume although the data, seed or batch changed; `--force` sets it for one start
    resume: Literal["auto", "never"] = "auto"
    on_error: Literal["stop", "warn"] = "stop"  # `warn`: a save may fail and training continues, but for the last save
    self_contained: bool = False  # also save what is in `prepared/`: larger, and needs no folder next to it

    def __post_init__(self) -> None:
        _positive(self.every, "every")
        _positive(self.keep, "keep")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The length of the run, the size of a step, and the optimizer. Where `steps` is set, `epochs` is ignored."""

    steps: int | None = None
    epochs: float = 1.0
    tokens_per_step: int | None = None  # a global token budget; default: one full bin per rank
    clip: float | None = 1.0
    max_skips: int = 5  # so many steps in a row with a gradient that is not finite end the run
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log_every: int = 1
    timeout: float = 120.0  # seconds that a rank waits for another one, after the first step

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "tokens_per_step", "clip", "max_skips", "log_every", "timeout"):
            _positive(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model. `path` is a folder or a hub name; `dtype` is what the weights are stored in while training."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    dropout: Literal["refuse", "off", "per_rank"] = "refuse"
    dequantize: bool = False  # decode the weights that the folder holds quantized; else they stay as they are stored
    initialise: bool = False  # random weights from the folder's config.json: pretraining from nothing
    roles: Mapping[str, str] = field(default_factory=dict)  # pattern -> role, where the anatomy knows none

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ConfigError("path is empty; give a folder or a hub name", field="path")


@dataclass(frozen=True, kw_only=True)
class StatisticsSection:
    """Statistics, by `treering measure`, of text that the model must keep; a run adds those of its training data."""

    path: str | None = None  # a folder of `treering measure`; null: `statistics` in the model's folder, if there is one
    tokens: int = 32768  # of the training data, measured at the end and added, if there are statistics; 0: nothing is

    def __post_init__(self) -> None:
        if self.path is not None and not self.path.strip():
            raise ConfigError("path is empty; name a folder of `treering measure`, or write null", field="path")
        if self.tokens < 0:
            raise ConfigError(f"tokens is {self.tokens}; it is at least 0", field="tokens")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """What is minimized for each trained token: cross-entropy with its label, or what is given here."""

    distill: Distill | None = None  # the probabilities of a teacher: [distillation](distill.md)

    def chosen(self) -> Objective | None:
        """Return the objective; None: cross-entropy."""
        return self.distill


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run as a value. The command line builds it from a file; a program can build it itself.

    Example:
        Job(model=Model(path="MODEL"), data=Data(train="chat.jsonl"), techniques=(tr.Full(),), output="runs/first")
    """

    model: Model
    data: Data
    techniques: tuple[Technique, ...]
    output: str
    train: Train = field(default_factory=Train)
    statistics: StatisticsSection = field(default_factory=StatisticsSection)
    objective: Objective | None = None  # None: cross-entropy
    mesh: Mapping[str, int] = field(default_factory=dict)  # keywords of treering.mesh
    seed: int = 0
    written: str = ""  # the resolved configuration as text, kept in the output folder
