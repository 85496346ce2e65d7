"""All of a block but its attention, in tiles, while the forward of the block stays as it is.

Its norms give a `Deferred`. The MLP appends itself, and adding the residual computes all of it, a tile at a time; q, k
and v are computed together, norm included, when the first of them is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward, install, undo_all
from treering.technique import Applied, Site
from treering.techniques.tiling.mlp import dense, notes, sums_wide, tile_experts, token_width
from treering.techniques.tiling.tile import TiledRegion, tile_length

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Block
    from treering.techniques.tiling.settings import TiledBlockSettings

# Children of an attention that read the block's normed input, where no other of its code does.
READERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
)
NORM = 8  # elements a token needs in a norm, as multiples of its width: float32 copies and their gradients

Step = Callable[[Tensor, Sequence[Tensor]], Tensor]

_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


@dataclass(frozen=True, kw_only=True)
class Deferred:
    """A value that is not computed yet: `steps`, applied in turn, beginning with a tile of the first of `tokens`.

    Each step is a function of the value so far and of a tile of all tokens.
    """

    tokens: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    through: tuple[nn.Module, ...] = ()  # the modules that the steps call
    compute: "Callable[[Deferred], Tensor]"
    error: Callable[[str], PlanError]
    fetched: dict[str, Tensor] = field(default_factory=dict)  # of q, k and v: those that were not read yet

    def then(self, step: Step, *modules: nn.Module) -> "Deferred":
        return replace(self, steps=(*self.steps, step), through=(*self.through, *modules), fetched={})

    def call(self, module: nn.Module, plain: Callable[[Tensor], Tensor]) -> "Deferred":
        return self.then(lambda value, tiles: plain(value), module)

    def on(self, tiles: Sequence[Tensor]) -> Tensor:
        value = tiles[0]
        for step in self.steps:
            value = step(value, tiles)
        return value

    def plus(self, other: Any, *, first: bool) -> Tensor:
        if not isinstance(other, Tensor) or other.shape != self.shape:
            raise self.error(f"a {type(other).__name__} is added")
        old = other is self.tokens[0]  # the residual, most of the time
        tokens = self.tokens if old else (*self.tokens, other)
        place = 0 if old else len(self.tokens)

        def add(value: Tensor, tiles: Sequence[Tensor]) -> Tensor:
            return tiles[place] + value if first else value + tiles[place]

        return self.compute(replace(self.then(add), tokens=tokens))

    @property
    def shape(self) -> torch.Size:
        return self.tokens[0].shape

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __add__(self, other: Any) -> Tensor:
        return self.plus(other, first=False)

    def __radd__(self, other: Any) -> Tensor:
        return self.plus(other, first=True)

    def __mul__(self, other: Any) -> "Deferred":
        if not isinstance(other, int | float):
            raise self.error(f"it is multiplied by a {type(other).__name__}")
        return self.then(lambda value, tiles: value * other)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by Python itself, when it copies
            raise AttributeError(name)
        raise self.error(f"its {name} is asked for")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDS and len(args) == 2 and not kwargs:
            left, right = args
            return right.plus(left, first=True) if isinstance(right, Deferred) else left.plus(right, first=False)
        if func is F.dropout and isinstance(args[0], Deferred):
            rest = args[1:]
            return args[0].then(lambda value, tiles: F.dropout(value, *rest, **kwargs))
        deferred = next(x for x in (*args, *kwargs.values()) if isinstance(x, Deferred))
        raise deferred.error(f"{getattr(func, '__name__', func)} is applied")


def install_blocks(model: nn.Module, config: "TiledBlockSettings", site: Site) -> Applied:
    """Install tiles in every block, as `TiledBlock` describes them."""
    anatomy = site.anatomy
    tiled_mlps = dense(model, anatomy)
    undone = [install(one) for b in anatomy.blocks for one in _forwards(model, config, anatomy, b, tiled_mlps)]
    undone += [tile_experts(model, config, anatomy, experts, "tiledblock") for experts in anatomy.experts]
    lines = (f"norms, q, k and v of {len(anatomy.blocks)} blocks in tiles as well",)
    return Applied(undo=undo_all(undone), notes=(*notes(config, len(tiled_mlps), len(anatomy.experts)), *lines))


class _Block:
    """The state that the forwards of one block's modules share: regions, and how long a tile may be. It refers to
    modules of the block alone, because a copy of one block takes it along."""

    def __init__(self, model: nn.Module, config: "TiledBlockSettings", anatomy: "Anatomy", block: "Block"):
        assert block.mlp is not None
        self.config, self.fqn, self.kind = config, block.fqn, type(model.get_submodule(block.fqn)).__name__
        self.mlp, self.mlp_width = model.get_submodule(block.mlp), token_width(anatomy, block.mlp)
        self.regions: dict[tuple[nn.Module, ...], TiledRegion] = {}

    @torch.compiler.disable
    def run(self, fn: Callable[..., Any], deferred: Deferred, more: tuple[nn.Module, ...], width: int) -> Any:
        modules = (*deferred.through, *more)
        if modules not in self.regions:
            self.regions[modules] = TiledRegion(f"{self.fqn} ({_names(modules)})", modules, "tiledblock")
        region, x = self.regions[modules], deferred.tokens[0]
        width += NORM * x.shape[-1] + (self.mlp_width if self.mlp in modules else 0)
        size = tile_length(self.config.tile, self.config.budget, width * x.element_size(), x.shape[-1])
        wide = sums_wide(region, self.config.accumulate, self.config.budget)
        return region(fn, *deferred.tokens, size=size, dims=x.ndim - 1, wide=wide)

    def begin(self, x: Tensor | Deferred) -> Deferred:
        return x if isinstance(x, Deferred) else Deferred(tokens=(x,), compute=self.compute, error=self.error)

    def compute(self, deferred: Deferred) -> Tensor:
        bare = replace(deferred, tokens=(), fetched={})
        return self.run(lambda *tiles: bare.on(tiles), deferred, (), 0)

    def error(self, why: str) -> PlanError:
        return PlanError(
            f"tiledblock: the block {self.fqn} ({self.kind}) is not laid out in a known way: where its norms or MLP "
            f"are used, {why}. Use tiledmlp instead",
            settings=("tiledblock",),
        )


class _PartForward(ModuleForward):
    """The forward of a module of a block."""

    def __init__(self, module: nn.Module, shared: _Block):
        super().__init__(module)
        self.shared = shared


class _DeferredForward(_PartForward):
    """The forward of a norm, or an MLP: only recorded, to be computed with what follows."""

    def __call__(self, x: Tensor | Deferred) -> Deferred:
        return self.shared.begin(x).call(self.module, self.call_former)


class _TiledForward(_PartForward):
    """The forward of an MLP next to experts: computed at once."""

    def __call__(self, x: Tensor | Deferred) -> Tensor:
        return self.shared.compute(self.shared.begin(x).call(self.module, self.call_former))


class _RouterForward(_PartForward):
    """The forward of an MLP with a router, which reads all tokens: before it, only the norm is in tiles."""

    def __call__(self, x: Tensor | Deferred) -> Any:
        return self.call_former(self.shared.compute(x) if isinstance(x, Deferred) else x)


class _ReaderForward(_PartForward):
    """The forward of one of the linears that read an attention's input: the first to be asked computes all of them,
    `outputs` in sum, norm included."""

    def __init__(self, shared: _Block, name: str, readers: dict[str, nn.Module], outputs: int):
        super().__init__(readers[name], shared)
        self.name, self.readers, self.outputs = name, readers, outputs

    def __call__(self, x: Tensor | Deferred) -> Tensor:
        if not isinstance(x, Deferred):
            return self.call_former(x)
        if self.name not in x.fetched:
            x.fetched.update(zip(self.readers, self._read_all(x)))
        return x.fetched.pop(self.name)

    def _read_all(self, x: Deferred) -> tuple[Tensor, ...]:
        bare = replace(x, tokens=(), fetched={})  # the graph keeps `fn` until the backward: no tensor may hang on it
        modules = tuple(self.readers.values())

        def fn(*tiles: Tensor) -> tuple[Tensor, ...]:
            value = bare.on(tiles)
            return tuple(module(value) for module in modules)

        return self.shared.run(fn, x, modules, 2 * self.outputs)


def _forwards(
    model: nn.Module, config: "TiledBlockSettings", anatomy: "Anatomy", block: "Block", tiled_mlps: Sequence[str]
) -> list[ModuleForward]:
    """Return the forwards to install in one block. `tiled_mlps`: names of MLPs that compute on single tokens."""
    shared, get = _Block(model, config, anatomy, block), model.get_submodule
    forwards: list[ModuleForward] = [
        _DeferredForward(get(name), shared) for name in anatomy.norms if name.rpartition(".")[0] == block.fqn
    ]
    if block.mlp in tiled_mlps:
        forwards.append(_DeferredForward(shared.mlp, shared))
    else:
        forwards.append(_RouterForward(shared.mlp, shared))
        forwards += [_TiledForward(get(name), shared) for name in tiled_mlps if name.startswith(f"{block.mlp}.")]
    return [*forwards, *_readers(get(block.attention or ""), shared, anatomy, block)]


def _readers(attention: Any, shared: _Block, anatomy: "Anatomy", block: "Block") -> list[ModuleForward]:
    names = next((n for n in READERS if all(hasattr(attention, one) for one in n)), None)
    if names is None:
        children = ", ".join(name for name, _ in attention.named_children())
        raise shared.error(f"its attention has none of the known projections, but {children}")
    full = {f"{block.attention}.{name}" for name in names}
    outputs = sum(linear.outputs for linear in anatomy.linears if linear.fqn in full)
    readers = {name: getattr(attention, name) for name in names}
    return [_ReaderForward(shared, name, readers, outputs) for name in names]


def _names(modules: Sequence[nn.Module]) -> str:
    return ", ".join(type(module).__name__ for module in modules)
