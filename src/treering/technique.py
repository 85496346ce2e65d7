"""The contract: a technique is a frozen dataclass with a stage and two or three functions; everything else is a value.

    claims(anatomy, mesh)                  what it will change: pure, before any weight is read
    apply(model, site)                     changes structure only, in place, on the meta device; returns an `Applied`
    resolve(anatomy, source, statistics)   optional: choices that depend on data become explicit settings
    lighter()                              optional, of the class: the `Variant`s that need less memory

`Part`s describe how plain weights are loaded and exported: loading is `split`, exporting is `join`, and resuming calls
neither.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from treering.anatomy import Anatomy
    from treering.objectives import Objective

    Batch = dict[str, Any]


class Stage(IntEnum):
    """The total order in which techniques are applied, whatever order the user wrote them in.

    Adapters must see what will be stored. Forward rewrites must lie inside what is recomputed and compiled. A parameter
    added after `fully_shard` would train unsynchronised without any error, so sharding is the last stage that may add
    one. Observers come after it and add none.
    """

    QUANTIZE = 1
    ADAPT = 2
    FORWARD = 3
    RECOMPUTE = 4
    COMPILE = 5
    SHARD = 6
    OBSERVE = 7


ParameterAspect = Literal["storage", "value", "addend", "gradient"]
ModuleAspect = Literal["forward", "region", "attention", "compiled", "sharding", "loss"]
Need = Literal["plain_weight", "own_value", "no_fsdp_unit_inside"]
Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One thing that a technique will change. Same name, same aspect and either side exclusive: a conflict.

    Attributes:
        fqn: A plain parameter or a module.
        aspect: What of it is changed.
        exclusive: No other technique may claim the same aspect of the same name.
        needs: What must hold for the claim to be possible, whoever claims what else.
        setting: The key of the technique's config that decides this claim, for messages.
        remedy: What to do, for messages, where no setting of the technique leaves the weight to another one.
    """

    fqn: str
    aspect: ParameterAspect | ModuleAspect
    exclusive: bool = True
    needs: tuple[Need, ...] = ()
    setting: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """How a folder holds a quantized weight W […, outputs, inputs], experts of a stack in front.

    Attributes:
        form: The number format, a `treering.formats.Format`.
        tensors: The uint8 tensors of the format, by its names for them. Those of a stack have experts in front.
        rounding: The dtype to which the format's own library rounds W before anything uses it; None: to none.
    """

    form: Any
    tensors: "Mapping[str, LazyTensor]"
    rounding: "torch.dtype | None" = None


class LazyTensor(Protocol):
    """A plain weight that is read when asked for.

    `stored` is None where the folder holds the weight itself. Where it holds a quantized one, `stored` has its codes
    and scales, and `read` decodes them. `start` is the place of its first row in the complete weight: not 0 where
    `split` is given some of the rows, such as a few experts of a stack.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> "torch.dtype": ...
    @property
    def stored(self) -> StoredTensor | None: ...
    @property
    def start(self) -> int: ...
    def read(self) -> "Tensor": ...
    def rows(self, start: int, stop: int) -> "Tensor": ...


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a weight W […, outputs, inputs], experts of a stack in front, is published in a number format.

    Attributes:
        form: The number format, a `treering.formats.Format`.
        names: The live names that `tensors` reads: the plain name where the plain weight is stored.
        tensors: (tensors by live name) → the uint8 tensors of the format, by its names for them.
        transposed: The plain parameter has inputs before outputs.
    """

    form: Any
    names: tuple[str, ...]
    tensors: "Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]"
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one technique holds its share of one plain tensor.

    `below` is what earlier parts of the same tensor reproduce: the plain weight while its parameter exists, else zeros.

    Attributes:
        names: Live names of the technique's own tensors.
        split: (weight, below, statistics) → own tensors by live name. It may also return the plain name itself, to move
            the base (PiSSA), only while the plain parameter still exists.
        join: (tensors, below) → the plain weight as the parts up to this one reproduce it.
        reads_weight: False: `split` needs shape and seed only (an adapter that starts at zero); nothing is cached.
        moves_base: `split` also returns the plain parameter's new value.
        writes_base: The plain parameter changes while the model trains, although no optimizer steps it: a checkpoint
            holds it.
        keeps_base: False: the plain parameter no longer exists.
        independent_rows: Row i of every own tensor depends on row i of the weight alone.
        compute_dtype: Pins storage and arithmetic against mixed precision.
        tolerance: The largest ‖join(split(W)) − W‖ / ‖W‖, checked at load; None: the start changes W.
        cost: Of `split`, in any unit: work is assigned to ranks longest first.
        joins: The names that `join` reads; None: all of them.
        identity: What the result of `split` depends on besides weight and statistics; "": the technique and the seed.
        measured: False: `split` does not read statistics.
        saved: False: a checkpoint does not hold these tensors where a prepared result does. A resume takes them from
            there, bit for bit, or makes them again by `split`, equal to rounding. So none of them may be trained or
            changed after the start, and nothing that is saved may depend on the sign or the order of their directions:
            a projector may be made again, a basis that trained coefficients refer to may not.
        copies: Live names that have the values of the folder's own tensors, each with its name in
            `LazyTensor.stored.tensors`. They are copied as plain weights are, each rank its rows, by no `split`, and no
            checkpoint or prepared result holds them. `split` returns them where another part reads the weight.
        packing: How the weight that this part reproduces is published in a number format; None: in none.
    """

    names: tuple[str, ...]
    split: "Callable[[LazyTensor, Callable[[], Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]"
    join: "Callable[[Mapping[str, Tensor], Tensor], Tensor]"
    reads_weight: bool = True
    moves_base: bool = False
    writes_base: bool = False
    keeps_base: bool = True
    independent_rows: bool = False
    compute_dtype: "torch.dtype | None" = None
    tolerance: float | None = 1e-5
    cost: float = 0.0
    joins: tuple[str, ...] | None = None
    identity: str = ""
    measured: bool = True
    saved: bool = True
    copies: Mapping[str, str] = field(default_factory=dict)
    packing: Packing | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedMatrix:
    """One tensor that learns, and where what its gradient is made of can be seen.

    With a_TM the inputs and g_TN the gradients of the outputs of `module`, T tokens, the gradient of the tensor is

        Σ_t outputs(g)_t inputs(a)_tᵀ        (its transpose where `transposed`)

    Read both while the parameters of `module` are gathered: in its forward and its backward.

    Attributes:
        name: Live name of the tensor.
        module: Live name of the module whose input is a and whose output's gradient is g. Of stacked experts it is the
            module that holds the stack, and a and g are those of the tokens that were routed to `expert`.
        expert: Which matrix of a stack; None where the tensor is one matrix.
        inputs: From a to what the tensor multiplies; None: a itself.
        outputs: From g to the gradient of what the tensor gives; None: g itself.
        transposed: The tensor is stored inputs × outputs.
    """

    name: str
    module: str
    expert: int | None = None
    inputs: "Callable[[Tensor], Tensor] | None" = None
    outputs: "Callable[[Tensor], Tensor] | None" = None
    transposed: bool = False


Maps = Mapping[str, tuple[TrainedMatrix, ...]]  # by the plain name of the weight that the matrices change
Without = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a technique may know, besides the model, where it is applied.

    Attributes:
        anatomy: The plain model, described.
        mesh: Of all ranks; None: one rank.
        seed: For everything that is drawn.
        parts: Plain name → the parts of the techniques applied before, in their order.
        statistics: What was measured, by plain name; reading a weight's may take seconds.
        maps: Plain name → the trained matrices of the techniques applied before.
        without: Opens a context in which the model computes as if the techniques applied before were absent. Raises
            PlanError where one of them trains the plain weights themselves.
        open_folder: From the path or hub name of an unquantized model to its plain tensors, by plain name. None: no
            folder can be opened.
    """

    anatomy: "Anatomy"
    mesh: "DeviceMesh | None"
    seed: int = 0
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, Any]] | None = None
    maps: Maps = field(default_factory=dict)
    without: Without = nullcontext
    open_folder: "Callable[[str], Mapping[str, LazyTensor]] | None" = None


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A tensor of a published file that is computed from a technique's own tensors, whose live names are `names`."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    make: "Callable[[Mapping[str, Tensor]], Tensor]"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How a technique's own tensors are published: the file's keys and the config that is written next to them.

    Attributes:
        name: What `export(adapter=…)` calls it.
        keys: Live name → key in the file.
        config: The content of `config_file`.
        derived: Key in the file → how its tensor is computed.
        only_with: What else the adapter fits, where it does not fit the published model: it is not exported alone.
        each_expert: model → `derived` and `config` of a folder with a tensor for each expert, under its published name,
            in place of those of stacks, which have no `keys`; None: there are no stacks.
    """

    name: str
    keys: Mapping[str, str]
    config: Mapping[str, Any]
    derived: Mapping[str, Derived] = field(default_factory=dict)
    file: str = "adapter_model.safetensors"
    config_file: str = "adapter_config.json"
    only_with: str = ""
    each_expert: "Callable[[PreTrainedModel], tuple[Mapping[str, Derived], Mapping[str, Any]]] | None" = None

    @property
    def own(self) -> set[str]:
        """Live names of everything that the file is computed from."""
        return set(self.keys) | {name for derived in self.derived.values() for name in derived.names}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step, as far as communication depends on it.

    Attributes:
        tokens: Of one micro-batch's row, before any technique cuts it.
        micro_batches: Forward and backward passes in the step, on each rank.
        sequence: As if the mesh's axis `sequence` had so many ranks, to compare meshes; None: it is as it is.
        own_teacher: The model runs forward once more for each micro-batch, without gradients, as its own teacher.
    """

    tokens: int
    micro_batches: int = 1
    sequence: int | None = None
    own_teacher: bool = False


@dataclass(frozen=True, kw_only=True)
class Message:
    """One kind of communication of a technique in one optimizer step, as this rank takes part in it.

    Attributes:
        kind: The collective.
        axes: The axes of the mesh over which it runs.
        ranks: The number of ranks that take part.
        bytes: What this rank gives to all `calls` together: its own rows for all_gather, the whole tensor for
            reduce_scatter and all_reduce, what is for other ranks for all_to_all.
        calls: How often.
        content: What is sent, in a word or two.
        stride: Every how many ranks of `axes` take part.
        overlaps: Whether it is sent while the ranks compute something that does not need it.
    """

    kind: Collective
    axes: tuple[str, ...]
    ranks: int
    bytes: int
    calls: int
    content: str
    stride: int = 1
    overlaps: bool = False

    @property
    def sent(self) -> float:
        """Bytes that this rank sends over its link if the collective runs as a ring."""
        others = (self.ranks - 1) / self.ranks
        factor = {"all_gather": self.ranks - 1, "reduce_scatter": others, "all_reduce": 2 * others, "all_to_all": 1}
        return self.bytes * factor[self.kind]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way in which a technique makes a run need less memory, for `treering plan` to propose.

    Attributes:
        name: What it is, for people: "a tiled loss".
        config: The lines of the configuration.
        order: Variants with small numbers cost least and are proposed first.
        of: From the technique as it is configured (None: it is not) to the one to try; None where it changes nothing
            or another variant must come first.
        replaces: Keys of techniques that it takes the place of.
    """

    name: str
    config: str
    order: int
    of: Callable[[Any], "Technique | None"]
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What the application of a technique returns. Every field is optional.

    Attributes:
        trainable: Live parameter names that learn; nothing else does.
        parts: Plain parameter name → how its share is held.
        batch: A transform of each micro-batch.
        loss: The sum of an objective over trained tokens; of at most one technique.
        objective: The one that the technique's settings ask for.
        gradients: Called once per step, after the last backward, before the finite guard and clipping.
        before_step: Called after clipping; keeps what `after_step` needs.
        after_step: Called after the optimizers: retraction.
        state: Live tensors that a checkpoint keeps, restored in place.
        metrics: Numbers for the log.
        adapter: How the technique's own tensors are published.
        resting: Where parameters live between uses.
        undo: Removes forward rewrites and observers. Parameters stay.
        messages: The communication of one step, computed from shapes once every technique is applied.
        tokens: Where `batch` cuts rows over ranks: from the number of a micro-batch's tokens to the ranges of them that
            this rank computes; of at most one technique. None: all of them.
        busiest: Where ranks share a row: which part of its attention the rank that has most of it computes. None: each
            as much as every other.
        compared: Lines for `explain()` that compare what the technique has chosen with what it has not.
        maps: Plain name → the tensors that learn instead of, or as, this weight.
        without: Opens a context in which the model computes, without gradients, as if the technique were absent. None:
            that is not possible (the plain weights themselves train), unless nothing of the technique learns.
        watch: Opened around every loss with a gradient, with its batch, which then has `document_numbers`; what it
            gives is applied to the loss.
        finish: Called on every rank when training is over: `run.finish()`.
        notes: Lines for `explain()`.
        warnings: What a person should know before training: in `explain()`, and when a run starts.
    """

    trainable: tuple[str, ...] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)
    batch: "Callable[[Batch], Batch] | None" = None
    loss: "Callable[[nn.Module, Batch, Objective], Tensor] | None" = None
    objective: "Objective | None" = None
    gradients: Callable[[], None] | None = None
    before_step: "Callable[[Sequence[Optimizer]], None] | None" = None
    after_step: Callable[[], None] | None = None
    state: "Callable[[], dict[str, Tensor]] | None" = None
    metrics: Callable[[], dict[str, float]] | None = None
    adapter: Adapter | None = None
    resting: Literal["device", "cpu"] = "device"
    undo: Callable[[], None] | None = None
    messages: Callable[[Workload], Sequence[Message]] | None = None
    tokens: Callable[[int], tuple[range, ...]] | None = None
    busiest: Callable[[Workload], float] | None = None
    compared: Callable[[Workload], Sequence[str]] | None = None
    maps: Maps = field(default_factory=dict)
    without: Without | None = None
    watch: "Callable[[Batch], AbstractContextManager[Callable[[Tensor], Tensor]]] | None" = None
    finish: Callable[[], None] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@runtime_checkable
class Technique(Protocol):
    """What `compose` accepts.

    More methods are optional. `resolve(anatomy, source, statistics) -> Technique` sees, in `source.tensors`, what
    techniques of the stage QUANTIZE reproduce of a weight, as `read()`, and the weight itself as `original`.
    `lighter() -> Sequence[Variant]`, a class or static method, names what makes a run need less memory.
    `with_stored(stored) -> Technique` returns the technique that keeps weights as their folder stores them, by plain
    name; `for_stored() -> Technique`, a class or static method, one to add if none of those given `keeps_stored`.
    `for_teacher(student, mesh) -> Technique` returns the technique that a frozen teacher gets where the run has this
    one; a teacher gets no others. `student` is the anatomy of the run's model, whose batches the teacher is given.
    """

    @property
    def stage(self) -> Stage: ...
    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> Sequence[Claim]: ...
    def apply(self, model: "nn.Module", site: Site) -> Applied: ...


Recompute = Literal["forward", "recompute", "tile", "teacher"]
_recompute: ContextVar[Recompute] = ContextVar("treering_recompute", default="forward")


def recompute_state() -> Recompute:
    """Return which pass a forward belongs to, so that an observer counts each token once."""
    return _recompute.get()


def recomputing(kind: Recompute) -> AbstractContextManager[None]:
    """Mark the forwards inside as a second pass: again in the backward, or as a teacher, without techniques."""

    @contextmanager
    def scope():
        token = _recompute.set(kind)
        try:
            yield
        finally:
            _recompute.reset(token)

    return scope()


@dataclass(frozen=True, kw_only=True)
class TileRows:
    """Which rows of how many a tile is computed on. Where they are not `of_tokens`, they are experts."""

    start: int
    stop: int
    total: int
    of_tokens: bool = True


_tile_rows: ContextVar[TileRows | None] = ContextVar("treering_tile_rows", default=None)


def tile_rows() -> TileRows | None:
    """Return which rows the modules of a tile are called with; None outside of tiles."""
    return _tile_rows.get()


def in_tile(rows: TileRows) -> AbstractContextManager[None]:
    """Mark the forwards inside as those of a tile of `rows`."""

    @contextmanager
    def scope():
        token = _tile_rows.set(rows)
        try:
            yield
        finally:
            _tile_rows.reset(token)

    return scope()
