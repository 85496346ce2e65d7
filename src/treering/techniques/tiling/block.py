"""All of a block but its attention, in tiles, while the block's own forward stays as it is.

Its norms give a `Later`. The MLP appends itself, and adding the residual computes all of it, a tile at a time; q, k
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
from treering.techniques.tiling.later import Later
from treering.techniques.tiling.lengths import tile_length
from treering.techniques.tiling.mlp import dense, notes, sums_wide, tile_experts, token_width
from treering.techniques.tiling.region import Region

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


def attach(model: nn.Module, config: "TiledBlockSettings", site: Site) -> Applied:
    anatomy = site.anatomy
    whole = dense(model, anatomy)
    undone = [install(one) for b in anatomy.blocks for one in _forwards(model, config, anatomy, b, whole)]
    undone += [tile_experts(model, config, anatomy, experts, "tiledblock") for experts in anatomy.experts]
    lines = (f"norms, q, k and v of {len(anatomy.blocks)} blocks in tiles as well",)
    return Applied(undo=undo_all(undone), notes=(*notes(config, len(whole), len(anatomy.experts)), *lines))


class _Block:
    """What the forwards of one block's modules share: regions, and how long a tile may be. It refers to modules of the
    block alone, because a copy of one block takes it along."""

    def __init__(self, model: nn.Module, config: "TiledBlockSettings", anatomy: "Anatomy", block: "Block"):
        assert block.mlp is not None
        self.config, self.fqn, self.kind = config, block.fqn, type(model.get_submodule(block.fqn)).__name__
        self.mlp, self.mlp_width = model.get_submodule(block.mlp), token_width(anatomy, block.mlp)
        self.regions: dict[tuple[nn.Module, ...], Region] = {}

    @torch.compiler.disable
    def run(self, fn: Callable[..., Any], late: Later, more: tuple[nn.Module, ...], width: int) -> Any:
        modules = (*late.through, *more)
        if modules not in self.regions:
            self.regions[modules] = Region(f"{self.fqn} ({_names(modules)})", modules, "tiledblock")
        region, x = self.regions[modules], late.tokens[0]
        width += NORM * x.shape[-1] + (self.mlp_width if self.mlp in modules else 0)
        size = tile_length(self.config.tile, self.config.budget, width * x.element_size(), x.shape[-1])
        wide = sums_wide(region, self.config.accumulate, self.config.budget)
        return region(fn, *late.tokens, size=size, dims=x.ndim - 1, wide=wide)

    def begin(self, x: Tensor | Later) -> Later:
        return x if isinstance(x, Later) else Later(tokens=(x,), compute=self.compute, error=self.error)

    def compute(self, late: Later) -> Tensor:
        bare = replace(late, tokens=(), fetched={})
        return self.run(lambda *tiles: bare.on(tiles), late, (), 0)

    def error(self, why: str) -> PlanError:
        return PlanError(
            f"tiledblock: the block {self.fqn} ({self.kind}) is not laid out in a known way: where its norms or MLP "
            f"go on, {why}. Use tiledmlp instead",
            settings=("tiledblock",),
        )


class _PartForward(ModuleForward):
    """Of a module of a block."""

    def __init__(self, module: nn.Module, shared: _Block):
        super().__init__(module)
        self.shared = shared


class _LaterForward(_PartForward):
    """Of a norm, or an MLP: only remembered, to be computed with what follows."""

    def __call__(self, x: Tensor | Later) -> Later:
        return self.shared.begin(x).call(self.module, self.call_former)


class _TiledForward(_PartForward):
    """Of an MLP beside experts: computed at once."""

    def __call__(self, x: Tensor | Later) -> Tensor:
        return self.shared.compute(self.shared.begin(x).call(self.module, self.call_former))


class _WholeForward(_PartForward):
    """A router looks at all tokens: before it, only the norm is in tiles."""

    def __call__(self, x: Tensor | Later) -> Any:
        return self.call_former(self.shared.compute(x) if isinstance(x, Later) else x)


class _ReaderForward(_PartForward):
    """Of one of the linears that read an attention's input: the first to be asked computes all of them, `outputs` in
    sum, norm included."""

    def __init__(self, shared: _Block, name: str, readers: dict[str, nn.Module], outputs: int):
        super().__init__(readers[name], shared)
        self.name, self.readers, self.outputs = name, readers, outputs

    def __call__(self, x: Tensor | Later) -> Tensor:
        if not isinstance(x, Later):
            return self.call_former(x)
        if self.name not in x.fetched:
            x.fetched.update(zip(self.readers, self._read_all(x)))
        return x.fetched.pop(self.name)

    def _read_all(self, x: Later) -> tuple[Tensor, ...]:
        bare = replace(x, tokens=(), fetched={})  # the graph keeps `fn` until the backward: no tensor may hang on it
        modules = tuple(self.readers.values())

        def fn(*tiles: Tensor) -> tuple[Tensor, ...]:
            value = bare.on(tiles)
            return tuple(module(value) for module in modules)

        return self.shared.run(fn, x, modules, 2 * self.outputs)


def _forwards(
    model: nn.Module, config: "TiledBlockSettings", anatomy: "Anatomy", block: "Block", whole: Sequence[str]
) -> list[ModuleForward]:
    """`whole`: names of the MLPs that are one function of single tokens."""
    shared, get = _Block(model, config, anatomy, block), model.get_submodule
    found: list[ModuleForward] = [
        _LaterForward(get(name), shared) for name in anatomy.norms if name.rpartition(".")[0] == block.fqn
    ]
    if block.mlp in whole:
        found.append(_LaterForward(shared.mlp, shared))
    else:
        found.append(_WholeForward(shared.mlp, shared))
        found += [_TiledForward(get(name), shared) for name in whole if name.startswith(f"{block.mlp}.")]
    return [*found, *_readers(get(block.attention or ""), shared, anatomy, block)]


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
