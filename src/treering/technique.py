"""The contract. A technique is a frozen dataclass with a stage and two or three functions; everything else is a value.

    claims(anatomy, mesh)   what it will touch: pure, before any weight is read
    apply(model, site)      structure only, in place, on the meta device; returns an `Applied`
    resolve(anatomy, source, statistics)   optional: data-dependent choices become explicit settings

How plain weights get in and out is told by `Part`s: loading is `split`, exporting is `join`, resuming is neither.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from treering.anatomy import Anatomy
    from treering.objectives import Objective

    Batch = dict[str, Any]


class Stage(IntEnum):
    """The total order in which techniques are applied, whatever order the user wrote them in.

    Adapters must see what will be stored; forward rewrites must lie inside what is recomputed and compiled; and a
    parameter added after `fully_shard` would train unsynchronised without any error, so sharding is last.
    """

    QUANTIZE = 1
    ADAPT = 2
    FORWARD = 3
    RECOMPUTE = 4
    COMPILE = 5
    SHARD = 6


ParameterAspect = Literal["storage", "addend", "gradient"]
ModuleAspect = Literal["forward", "region", "attention", "compiled", "sharding", "loss"]
Need = Literal["plain_weight", "no_fsdp_unit_inside"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`fqn` names a plain parameter or a module. Same name, same aspect and either side exclusive: a conflict.

    `setting` is the key of the technique's config that decides this claim, for the message.
    """

    fqn: str
    aspect: ParameterAspect | ModuleAspect
    exclusive: bool = True
    needs: tuple[Need, ...] = ()
    setting: str = ""


class LazyTensor(Protocol):
    """A plain weight that is not read until it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> "torch.dtype": ...
    def read(self) -> "Tensor": ...
    def rows(self, start: int, stop: int) -> "Tensor": ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one technique holds its share of one plain tensor.

    split(weight, below, statistics) -> own tensors by live name. It may also return the plain name itself, to move
        the base (PiSSA); only while the plain parameter still exists.
    join(tensors, below) -> the plain weight as this link of the chain reproduces it.
    `below` is what earlier links already reproduce: the plain weight while that parameter exists, else zeros.
    """

    names: tuple[str, ...]
    split: "Callable[[LazyTensor, Callable[[], Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]"
    join: "Callable[[Mapping[str, Tensor], Tensor], Tensor]"
    reads_weight: bool = True  # False: split needs shape and seed only (a zero-start adapter), nothing is cached
    moves_base: bool = False  # True: split also returns the plain parameter's new value
    keeps_base: bool = True  # False: the plain parameter is gone
    independent_rows: bool = False  # True: row i of every own tensor depends on row i of the weight alone
    compute_dtype: "torch.dtype | None" = None  # pins storage and arithmetic against mixed precision
    tolerance: float | None = 1e-5  # of ‖join(split(W)) − W‖ / ‖W‖, checked at load; None: the start changes W
    cost: float = 0.0  # of split, any unit: work is shared out longest first
    joins: tuple[str, ...] | None = None  # the names that `join` reads; None: all of them
    identity: str = ""  # what split's result depends on besides weight and statistics; "": the technique and the seed
    measured: bool = True  # False: split does not look at statistics


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a technique is applied: everything it may know besides the model."""

    anatomy: "Anatomy"
    mesh: "DeviceMesh | None"
    seed: int = 0
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)  # plain name -> chain so far
    statistics: Mapping[str, Mapping[str, Any]] | None = None  # what was measured; reading a weight's may cost seconds


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A tensor of a published file that is made of a technique's own."""

    names: tuple[str, ...]  # own live names
    shape: tuple[int, ...]
    make: "Callable[[Mapping[str, Tensor]], Tensor]"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How a technique's own tensors are published: the file's keys and the config that goes beside them."""

    name: str
    keys: Mapping[str, str]  # own live name -> key in the file
    config: Mapping[str, Any]
    derived: Mapping[str, Derived] = field(default_factory=dict)  # key in the file -> what it is made of
    file: str = "adapter_model.safetensors"
    config_file: str = "adapter_config.json"

    @property
    def own(self) -> set[str]:
        return set(self.keys) | {name for derived in self.derived.values() for name in derived.names}


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What an application leaves behind. Every field is optional."""

    trainable: tuple[str, ...] = ()  # live parameter names that learn; nothing else does
    parts: Mapping[str, Part] = field(default_factory=dict)  # plain parameter name -> how its share is held
    batch: "Callable[[Batch], Batch] | None" = None  # a transform of each micro-batch
    loss: "Callable[[nn.Module, Batch, Objective], Tensor] | None" = (
        None  # sum over trained tokens; one technique at most
    )
    objective: "Objective | None" = None  # the one that the technique's settings ask for
    gradients: Callable[[], None] | None = None  # once per step, after the last backward, before the guard and clip
    before_step: "Callable[[Sequence[Optimizer]], None] | None" = None  # after clipping: keep what `after_step` needs
    after_step: Callable[[], None] | None = None  # retraction
    state: "Callable[[], dict[str, Tensor]] | None" = None  # live tensors that a checkpoint keeps, restored in place
    metrics: Callable[[], dict[str, float]] | None = None
    adapter: Adapter | None = None
    resting: Literal["device", "cpu"] = "device"  # where parameters live between uses
    undo: Callable[[], None] | None = None  # forward rewrites and observers only
    notes: tuple[str, ...] = ()  # lines for explain()
    warnings: tuple[str, ...] = ()  # what a person should know before training: in explain(), and when a run starts


@runtime_checkable
class Technique(Protocol):
    """What `compose` accepts. `resolve(anatomy, source, statistics) -> Technique` is optional."""

    @property
    def stage(self) -> Stage: ...
    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> Sequence[Claim]: ...
    def apply(self, model: "nn.Module", site: Site) -> Applied: ...


Recompute = Literal["forward", "recompute", "tile"]
_recompute: ContextVar[Recompute] = ContextVar("treering_recompute", default="forward")


def recompute_state() -> Recompute:
    """Which pass a forward belongs to, so that an observer counts each token once."""
    return _recompute.get()


def recomputing(kind: Recompute) -> AbstractContextManager[None]:
    """Mark the forwards inside as a second pass. Used by techniques that run a forward again in the backward."""

    @contextmanager
    def scope():
        token = _recompute.set(kind)
        try:
            yield
        finally:
            _recompute.reset(token)

    return scope()
