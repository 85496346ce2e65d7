"""All of a block but its attention, in tiles, while the forward of the block stays as it is.

Its norms give a `Deferred`. The MLP appends itself, and adding the residual computes all of it, a tile at a time; q, k
and v are computed together, norm included, when the first of them is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward, install, undo_all
from treering.technique import Applied, Site
from treering.techniques.tiling.deferred import Deferred
from treering.techniques.tiling.mlp import (
    dense,
    expert_rows,
    feed_forward,
    flat_rows,
    notes,
    outputs_of,
    sums_wide,
    tile_experts,
    token_width,
    with_router,
)
from treering.techniques.tiling.tile import TiledRegion, tile_length
from treering.techniques.tiling.trial import try_blocks

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Block
    from treering.techniques.tiling.settings import TiledBlockSettings

# Children of an attention that read the block's normed input, where no other of its code does.
READERS = (
    ("q_proj", "k_proj", "v_proj", "gate_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
)
NORM = 8  # elements a token needs in a norm, as multiples of its width: float32 copies and their gradients


def install_blocks(model: nn.Module, config: "TiledBlockSettings", site: Site) -> Applied:
    """Install tiles in every block, as `TiledBlock` describes them."""
    anatomy = site.anatomy
    tiled_mlps, whole = dense(model, anatomy), with_router(model, anatomy)
    undone = [install(one) for b in anatomy.blocks for one in _forwards(model, config, anatomy, b, tiled_mlps)]
    inside = [experts for experts in anatomy.experts if experts.fqn not in whole]
    undone += [tile_experts(model, config, anatomy, experts, "tiledblock") for experts in inside]
    undo = undo_all(undone)
    try:
        try_blocks(model, anatomy)
    except PlanError:
        undo()
        raise
    lines = (f"norms, q, k and v of {len(anatomy.blocks)} blocks in tiles as well",)
    return Applied(undo=undo, notes=(*notes(config, len(tiled_mlps), len(inside), len(whole)), *lines))


class _Block:
    """The state that the forwards of one block's modules share: regions, and how long a tile may be. It refers to
    modules of the block alone, because a copy of one block takes it along."""

    def __init__(self, model: nn.Module, config: "TiledBlockSettings", anatomy: "Anatomy", block: "Block"):
        self.config, self.fqn, self.kind = config, block.fqn, type(model.get_submodule(block.fqn)).__name__
        self.with_mlp = any(b.mlp is not None for b in anatomy.blocks)
        self.widths: dict[nn.Module, int] = {}  # elements that a token needs, of feed-forward modules
        self.regions: dict[tuple[nn.Module, ...], TiledRegion] = {}

    @torch.compiler.disable
    def run(self, fn: Callable[..., Any], deferred: Deferred, more: tuple[nn.Module, ...], width: int) -> Any:
        modules = (*deferred.through, *more)
        if modules not in self.regions:
            self.regions[modules] = TiledRegion(f"{self.fqn} ({_names(modules)})", modules, "tiledblock")
        region, x = self.regions[modules], deferred.tokens[0]
        width += NORM * x.shape[-1] + sum(self.widths.get(module, 0) for module in modules)
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
            f"are used, {why}. {'Use tiledmlp instead' if self.with_mlp else 'Leave tiledblock out'}",
            settings=("tiledblock",),
        )


class _PartForward(ModuleForward):
    """The forward of a module of a block."""

    uncompiled = True

    def __init__(self, module: nn.Module, shared: _Block):
        super().__init__(module)
        self.shared = shared

    def others(self, more: Sequence[Any], named: dict[str, Any]) -> list[Tensor]:
        """Return what the module is called with besides its input: rows of the same tokens."""
        if named or not all(isinstance(one, Tensor | Deferred) for one in more):
            raise self.shared.error(f"{type(self.module).__name__} is called with something besides rows of tokens")
        return [self.shared.compute(one) if isinstance(one, Deferred) else one for one in more]


class _DeferredForward(_PartForward):
    """The forward of a norm, or an MLP: only recorded, to be computed with what follows. One that is given the residual
    as well adds it, and is computed at once."""

    def __call__(self, x: Tensor | Deferred, *more: Any, **named: Any) -> Deferred | Tensor:
        others = self.others(more, named)
        called = self.shared.begin(x).call(self.module, self.call_former, others)
        return self.shared.compute(called) if others else called


class _PieceForward(_PartForward):
    """The forward of a linear of a feed-forward part that is not one module, or of the function between two."""

    def __init__(self, module: nn.Module, shared: _Block, width: int | None):
        super().__init__(module, shared)
        self.width = width

    def __call__(self, x: Tensor | Deferred) -> Deferred | Tensor:
        if not isinstance(x, Deferred) and self.width is None:  # a dropout of what attention gives, for one
            return self.call_former(x)
        return self.shared.begin(x).call(self.module, self.call_former, width=self.width)


class _TiledForward(_PartForward):
    """The forward of an MLP next to experts: computed at once."""

    def __call__(self, x: Tensor | Deferred) -> Tensor:
        return self.shared.compute(self.shared.begin(x).call(self.module, self.call_former))


class _RouterForward(_PartForward):
    """The forward of an MLP with a router, which reads all tokens: before it, only the norm is in tiles."""

    def __call__(self, x: Tensor | Deferred) -> Any:
        return self.call_former(self.shared.compute(x) if isinstance(x, Deferred) else x)


class _WholeForward(_PartForward):
    """The forward of an MLP whose router and experts are computed in tiles together, norm included."""

    def __call__(self, x: Tensor | Deferred) -> Any:
        deferred = self.shared.begin(x)
        rows = replace(deferred, tokens=flat_rows(deferred.tokens), fetched={})
        bare = replace(rows, tokens=())
        return self.shared.run(lambda *tiles: self.call_former(bare.on(tiles)), rows, (self.module,), 0)


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
    forwards += _feed_forward(model, shared, anatomy, block, tiled_mlps)
    return [*forwards, *_readers(get(block.attention or ""), shared, anatomy, block)]


def _feed_forward(
    model: nn.Module, shared: _Block, anatomy: "Anatomy", block: "Block", tiled_mlps: Sequence[str]
) -> list[ModuleForward]:
    get, whole = model.get_submodule, with_router(model, anatomy).values()
    forwards: list[ModuleForward] = []
    parts = feed_forward(anatomy, block)
    for name in parts:
        module = get(name)
        shared.widths[module] = token_width(anatomy, name)
        if name in whole:
            experts = next(e for e in anatomy.experts if e.fqn.startswith(f"{name}."))
            shared.widths[module] += 3 * experts.number * expert_rows(model, anatomy, experts)
            forwards.append(_WholeForward(module, shared))
        elif isinstance(module, nn.Linear):
            forwards.append(_PieceForward(module, shared, module.out_features))
        elif name in tiled_mlps:
            forwards.append(_DeferredForward(module, shared))
        else:
            forwards.append(_RouterForward(module, shared))
            forwards += [_TiledForward(get(one), shared) for one in tiled_mlps if one.startswith(f"{name}.")]
    if any(isinstance(get(name), nn.Linear) for name in parts):
        between = [m for m in get(block.fqn).children() if next(m.parameters(), None) is None]
        forwards += [_PieceForward(module, shared, None) for module in between]
    return forwards


def _readers(attention: Any, shared: _Block, anatomy: "Anatomy", block: "Block") -> list[ModuleForward]:
    """Return the forwards of what reads an attention's input. A layout may name a projection and have none (None)."""
    children = dict(attention.named_children())
    names = next((n for n in READERS if all(one in children for one in n)), None)
    if names is None:
        raise shared.error(f"its attention has none of the known projections, but {', '.join(children)}")
    outputs = sum(width for name in names for width in outputs_of(anatomy, f"{block.attention}.{name}"))
    readers = {name: getattr(attention, name) for name in names}
    return [_ReaderForward(shared, name, readers, outputs) for name in names]


def _names(modules: Sequence[nn.Module]) -> str:
    return ", ".join(type(module).__name__ for module in modules)
