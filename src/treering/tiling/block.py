"""All of a block but its attention, in tiles, while the block's own forward stays as it is.

Its norms give a `Later`. The MLP appends itself, and adding the residual computes all of it, a tile at a time; q, k
and v are computed together, norm included, when the first of them is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering import forwards
from treering.errors import PlanError
from treering.technique import Applied, Site
from treering.tiling.later import Later
from treering.tiling.lengths import tile_length
from treering.tiling.mlp import dense, notes, sums_wide, tile_experts, token_width
from treering.tiling.region import Region

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Block
    from treering.tiling.config import TiledBlock

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


def attach(model: nn.Module, config: "TiledBlock", site: Site) -> Applied:
    anatomy = site.anatomy
    whole = dense(model, anatomy)
    undone = [restore for b in anatomy.blocks for restore in _Block(model, config, anatomy, b).attach(whole)]
    undone += [tile_experts(model, config, anatomy, experts, "tiledblock") for experts in anatomy.experts]
    lines = (f"norms, q, k and v of {len(anatomy.blocks)} blocks in tiles as well",)
    return Applied(undo=forwards.undo_all(undone), notes=(*notes(config, len(whole), len(anatomy.experts)), *lines))


class _Block:
    def __init__(self, model: nn.Module, config: "TiledBlock", anatomy: "Anatomy", block: "Block"):
        self.model, self.config, self.anatomy, self.block = model, config, anatomy, block
        self.regions: dict[tuple[int, ...], Region] = {}

    def attach(self, whole: Sequence[str]) -> list[Callable[[], None]]:
        """`whole`: names of the MLPs that are one function of single tokens."""
        block, get = self.block, self.model.get_submodule
        undone = [self._lazy(get(name)) for name in self.anatomy.norms if name.rpartition(".")[0] == block.fqn]
        assert block.mlp is not None
        if block.mlp in whole:
            undone.append(self._lazy(get(block.mlp)))
        else:
            undone.append(self._seen_whole(get(block.mlp)))
            undone += [self._tiled(get(name)) for name in whole if name.startswith(f"{block.mlp}.")]
        return [*undone, *self._readers()]

    def _readers(self) -> list[Callable[[], None]]:
        attention: Any = self.model.get_submodule(self.block.attention or "")
        names = next((n for n in READERS if all(hasattr(attention, one) for one in n)), None)
        if names is None:
            children = ", ".join(name for name, _ in attention.named_children())
            raise self._error(f"its attention has none of the known projections, but {children}")
        modules = {name: getattr(attention, name) for name in names}
        return [self._reader(name, modules) for name in names]

    def _lazy(self, module: Any) -> Callable[[], None]:
        plain = module.forward

        def later(x: Tensor | Later) -> Later:
            return self._begin(x).call(module, plain)

        return forwards.replace(module, later)

    def _tiled(self, module: Any) -> Callable[[], None]:
        plain = module.forward
        return forwards.replace(module, lambda x: self._compute(self._begin(x).call(module, plain)))

    def _seen_whole(self, module: Any) -> Callable[[], None]:
        """A router looks at all tokens: before it, only the norm is in tiles."""
        plain = module.forward
        return forwards.replace(module, lambda x: plain(self._compute(x) if isinstance(x, Later) else x))

    def _reader(self, name: str, modules: dict[str, Any]) -> Callable[[], None]:
        plain = modules[name].forward

        def read(x: Tensor | Later) -> Tensor:
            if not isinstance(x, Later):
                return plain(x)
            if name not in x.fetched:
                x.fetched.update(zip(modules, self._read_all(x, modules)))
            return x.fetched.pop(name)

        return forwards.replace(modules[name], read)

    def _read_all(self, x: Later, modules: dict[str, Any]) -> tuple[Tensor, ...]:
        bare = replace(x, tokens=(), fetched={})  # the graph keeps `fn` until the backward: no tensor may hang on it

        def fn(*tiles: Tensor) -> tuple[Tensor, ...]:
            value = bare.on(tiles)
            return tuple(module(value) for module in modules.values())

        names = {f"{self.block.attention}.{name}" for name in modules}
        outputs = sum(linear.outputs for linear in self.anatomy.linears if linear.fqn in names)
        return self._run(fn, x, tuple(modules.values()), 2 * outputs)

    def _begin(self, x: Tensor | Later) -> Later:
        return x if isinstance(x, Later) else Later(tokens=(x,), compute=self._compute, error=self._error)

    def _compute(self, late: Later) -> Tensor:
        bare = replace(late, tokens=(), fetched={})
        return self._run(lambda *tiles: bare.on(tiles), late, (), 0)

    @torch.compiler.disable
    def _run(self, fn: Callable[..., Any], late: Later, more: tuple[nn.Module, ...], width: int) -> Any:
        modules = (*late.through, *more)
        key = tuple(map(id, modules))
        if key not in self.regions:
            self.regions[key] = Region(f"{self.block.fqn} ({_names(modules)})", modules, "tiledblock")
        region, x = self.regions[key], late.tokens[0]
        mlps = [n for n in (self.block.mlp,) if n is not None and self.model.get_submodule(n) in modules]
        width += NORM * x.shape[-1] + sum(token_width(self.anatomy, name) for name in mlps)
        size = tile_length(self.config.tile, self.config.budget, width * x.element_size(), x.shape[-1])
        wide = sums_wide(region, self.config.accumulate, self.config.budget)
        return region(fn, *late.tokens, size=size, dims=x.ndim - 1, wide=wide)

    def _error(self, why: str) -> PlanError:
        kind = type(self.model.get_submodule(self.block.fqn)).__name__
        return PlanError(
            f"tiledblock: the block {self.block.fqn} ({kind}) is not laid out in a known way: where its norms or MLP "
            f"go on, {why}. Use tiledmlp instead",
            settings=("tiledblock",),
        )


def _names(modules: Sequence[nn.Module]) -> str:
    return ", ".join(type(module).__name__ for module in modules)
